"""What answers are worth: a score from 0 to 1 for every test row, by its task's metric, and figures of each label."""

from __future__ import annotations

import importlib
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import regex
from rapidfuzz.distance import LCSseq

from deal_core.errors import ConfigError
from deal_core.safe_text import listed

if TYPE_CHECKING:
    from datasets import Dataset

ScoreAnswer = Callable[[str, str], float]
"""Answer and reference → score, 0 to 1."""

MODULES_VARIABLE = "DEAL_METRIC_MODULES"
"""Environment variable: the modules, separated by commas, whose functions may be a task's metric."""
COLLAPSE_SHARE, COLLAPSE_FACTOR = 0.5, 2.0
"""Answers to a task have collapsed if one label is at least this share of them, and this many times its share of the
references."""
_WITHOUT_SPACES = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]")
"""Thai, Lao, Burmese, Khmer, Japanese and Chinese characters."""
_WORD = regex.compile(r"\w+")
"""The module `regex` counts combining marks, such as vowel signs, as parts of a word; `re` does not."""
_BEFORE_NUMBER, _AFTER_NUMBER = r"(?<!\d[.,])(?<!(?:^|[^\w])[-\u2212])", r"(?![.,]\d)"
"""What may not stand around a number: other digits of the same number, or its sign. A hyphen after a word is none."""


def _in_words(text: str) -> str:
    """The text as words are compared: case-folded, and each letter with its marks in one form (NFC)."""
    return unicodedata.normalize("NFC", text.casefold())


def plain_answer(text: str) -> str:
    """Return an answer as answers are compared: stripped, case-folded and in one form (NFC).

    Tokenizers may give a letter with a mark in another form than a file does.
    """
    return _in_words(text.strip())


def exact_match(answer: str, expected: str) -> bool:
    """Whether two answers are the same; see `plain_answer`."""
    return plain_answer(answer) == plain_answer(expected)


def contains(answer: str, expected: str) -> float:
    """1 if the reference stands in the answer as whole words, else 0. Case and white space do not count.

    A reference in a script that writes no spaces between words may stand anywhere. A number is one word with its sign,
    its decimals and its groups of digits: 5 does not stand in 5.75, -5 or 1,005.
    """
    wanted, text = (" ".join(_in_words(part).split()) for part in (expected, answer))
    if _WITHOUT_SPACES.search(wanted):
        return float(wanted in text)
    before = _BEFORE_NUMBER if wanted[:1].isdigit() else ""
    after = _AFTER_NUMBER if wanted[-1:].isdigit() else ""
    return float(regex.search(rf"{before}(?<!\w){regex.escape(wanted)}(?!\w){after}", text) is not None)


def rouge_l(answer: str, expected: str) -> float:
    """ROUGE-L: F1 of the longest common subsequence of words (Lin, 2004).

    Words are runs of letters, digits and underscores of any script, case-folded and not stemmed. Two texts without
    words are equal. A language without spaces between words gives long "words", so the score is coarse there.
    """
    answer_words, expected_words = (_WORD.findall(_in_words(text)) for text in (answer, expected))
    num_words = len(answer_words) + len(expected_words)
    return 2 * LCSseq.similarity(answer_words, expected_words) / num_words if num_words else 1.0


def rouge1(answer: str, expected: str) -> float:
    """ROUGE-1: F1 of the words that two texts share. Words are case-folded, and repeated words count repeatedly."""
    answer_words, expected_words = Counter(answer.casefold().split()), Counter(expected.casefold().split())
    num_shared = (answer_words & expected_words).total()
    num_words = answer_words.total() + expected_words.total()
    return 2 * num_shared / num_words if num_words else 1.0


def json_fields(answer: str, expected: str) -> float:
    """Share of the fields of two JSON objects that are equal; 0 if the answer is no JSON object.

    A field of only one of the objects counts as wrong. Texts are compared after strip and case-fold. A reference that
    is no JSON object is compared as a whole.

    Example:
        >>> json_fields('{"name": "Ada", "age": 36}', '{"name": "ada", "age": 37}')
        0.5
    """
    wanted, fields = _json_object(expected), _json_object(answer)
    if wanted is None:
        return float(exact_match(answer, expected))
    if fields is None:
        return 0.0
    names = wanted.keys() | fields.keys()
    right = sum(same_json(wanted[name], fields[name]) for name in wanted.keys() & fields.keys())
    return right / len(names) if names else 1.0


def measured(answer: str, expected: str) -> float:
    """The score of a row that was measured, not answered: its "answer" is the number itself."""
    del expected
    return float(answer)


METRICS: dict[str, tuple[str, ScoreAnswer]] = {  # the keys are deal_core.config.METRICS
    "exact": ("accuracy", lambda answer, expected: float(exact_match(answer, expected))),
    "contains": ("answers that contain the reference", contains),
    "rouge_l": ("ROUGE-L", rouge_l),
    "json_fields": ("right fields", json_fields),
    "loss": ("probability per token", measured),
    "preference": ("preferred answers", measured),
}
"""A metric → its name for people, and its function.

loss: the reference's negative log-likelihood per token, L, as the score exp(−L): the geometric mean of its tokens'
probabilities. preference: whether the model prefers the better of two answers; see
`deal_core.evaluation.likelihood.preferred`. Nothing is generated for either."""


def metric_name(metric: str) -> str:
    """Name of a metric for people; of a function, its name without the module."""
    return METRICS[metric][0] if metric in METRICS else metric.rpartition(":")[2]


def scored_otherwise(metrics: Mapping[str, str]) -> str:
    """Say which tasks are not scored by exact match; empty if there are none."""
    others = [f"{task} by {metric_name(metric)}" for task, metric in metrics.items() if metric != "exact"]
    return f"Scored otherwise than by exact match: {', '.join(others)}." if others else ""


def require_metric(metric: str) -> ScoreAnswer:
    """Return a metric's function. Stages require it before anything is trained.

    Raises:
        ConfigError: It is a function of a module that is not allowed or not found.
    """
    if metric in METRICS:
        return METRICS[metric][1]
    module, _, name = metric.partition(":")
    allowed = [entry.strip() for entry in os.environ.get(MODULES_VARIABLE, "").split(",") if entry.strip()]
    if module not in allowed:
        raise ConfigError(
            f"task.metric is {metric!r}, but {MODULES_VARIABLE} does not allow the module {module!r}; it allows "
            f"{listed(allowed) or 'none'}. Who runs the worker sets this variable."
        )
    try:
        function: Any = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"task.metric is {metric!r}, which was not found: {error}.") from None
    if not callable(function):
        raise ConfigError(f"task.metric is {metric!r}, which is no function; give one of (answer, reference).")
    return function  # type: ignore[no-any-return]


def right_answers(rows: Dataset) -> list[str | Sequence[str]]:
    """The right answers of test rows: the column references where a row has several, else the output."""
    outputs = list(rows["output"])
    if "references" not in rows.column_names:
        return outputs
    return [several or output for several, output in zip(rows["references"], outputs, strict=True)]


def all_of(answers: str | Sequence[str]) -> Sequence[str]:
    """The right answers of one row as a sequence."""
    return (answers,) if isinstance(answers, str) else answers


def score_answers(metric: str, answers: Sequence[str], references: Sequence[str | Sequence[str]]) -> tuple[float, ...]:
    """Return the score of every answer. An answer with several references has the score of the best one.

    Raises:
        ConfigError: The metric is a function of a module that is not allowed or not found, or it fails, or it returns
            no number from 0 to 1.
    """
    score = require_metric(metric)
    return tuple(
        max(_checked(metric, score, answer, reference) for reference in all_of(right))
        for answer, right in zip(answers, references, strict=True)
    )


def _checked(metric: str, score: ScoreAnswer, answer: str, expected: str) -> float:
    if metric in METRICS:
        return score(answer, expected)
    try:
        value = float(score(answer, expected))
    except Exception as error:
        # the error itself may quote an answer
        raise ConfigError(f"task.metric {metric!r} failed ({type(error).__name__}); correct the function.") from None
    if not 0 <= value <= 1:  # also not a number
        raise ConfigError(f"task.metric {metric!r} returned {value}; return a number from 0 to 1.")
    return value


def _json_object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def same_json(first: Any, second: Any) -> bool:
    """Equality of JSON values in which true is not 1, and texts are equal without regard to case and outer blanks."""
    if isinstance(first, str) and isinstance(second, str):
        return exact_match(first, second)
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(same_json(first[name], second[name]) for name in first)
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(same_json, first, second))
    return bool(first == second) and isinstance(first, bool) is isinstance(second, bool)


@dataclass(frozen=True, kw_only=True)
class LabelFigures:
    """How one label is answered."""

    label: str | None
    """The label; None stands for all answers that are no label."""
    num_rows: int
    """Test rows with this label."""
    recall: float | None
    """Share of these rows that are answered with it; None without such rows."""
    share: float
    """Its share of all answers."""


def number_labels(labels: Sequence[str]) -> dict[str, int]:
    """Return the number of each label, by the label as answers are compared."""
    return {plain_answer(label): number for number, label in enumerate(labels)}


def label_figures(answers: Sequence[str], references: Sequence[str], labels: Sequence[str]) -> list[LabelFigures]:
    """Return the figures of every label in the schema's order; answers outside the labels come last, if there are any.

    Answers and labels are compared as accuracy compares them: stripped and case-folded.
    """
    answered = [plain_answer(answer) for answer in answers]
    expected = [plain_answer(reference) for reference in references]
    times_answered, times_expected = Counter(answered), Counter(expected)
    right = Counter(answer for answer, reference in zip(answered, expected, strict=True) if answer == reference)
    total = max(1, len(answered))
    figures = []
    for label in labels:
        name = plain_answer(label)
        num_rows = times_expected[name]
        recall = right[name] / num_rows if num_rows else None
        figures.append(LabelFigures(label=label, num_rows=num_rows, recall=recall, share=times_answered[name] / total))
    outside = len(answered) - sum(times_answered[plain_answer(label)] for label in labels)
    if outside:
        figures.append(LabelFigures(label=None, num_rows=0, recall=None, share=outside / total))
    return figures


def collapsed(figures: Sequence[LabelFigures]) -> LabelFigures | None:
    """Return the label that has taken over the answers, or None."""
    num_rows = max(1, sum(label.num_rows for label in figures))
    most = max(figures, key=lambda label: label.share, default=None)
    if most is None or most.share < COLLAPSE_SHARE or most.share < COLLAPSE_FACTOR * most.num_rows / num_rows:
        return None
    return most
