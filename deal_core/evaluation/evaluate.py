"""Score one model on a task's test rows, by the task's metric."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from deal_core.base_model.language_model import LanguageModel
from deal_core.config import MEASURED, PREFERENCE
from deal_core.data.prompts import encode_answer
from deal_core.data.schema import TaskSchema
from deal_core.evaluation.answering import ServedTask
from deal_core.evaluation.generation import Confidence, GivenAnswer, OnProgress, answer_inputs
from deal_core.evaluation.likelihood import preferred, token_probabilities
from deal_core.evaluation.metrics import (
    LabelFigures,
    all_of,
    label_figures,
    plain_answer,
    right_answers,
    rouge1,
    score_answers,
)

AnswerInputs = Callable[[ServedTask, Sequence[str], OnProgress | None], list[GivenAnswer]]
"""A task, its inputs and who hears of the progress → the answers, in order."""


@dataclass(frozen=True, kw_only=True)
class TaskEvaluation:
    """One model's answers to a task's test rows."""

    task: str
    accuracy: float
    """Mean score by the task's metric, 0 to 1. With the metric "exact": the share of right answers."""
    rouge1: float
    """Mean unigram F1 of answer and reference, the best one if a row has several."""
    num_rows: int
    majority_rate: float | None
    """Score of always giving the most common reference; None for measured metrics, which ask nothing."""
    answers: tuple[str, ...]
    """The generated answers, in the rows' order; with a measured metric, the scores as texts."""
    outcomes: tuple[float, ...]
    """Each row's score, 0 to 1, in the rows' order."""
    labels: tuple[LabelFigures, ...]
    """How each label is answered; empty for an open task, and for measured metrics."""
    confidences: tuple[Confidence, ...] = ()
    """How sure the model was of each answer, in the rows' order; empty for measured metrics."""


def evaluate_task(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    task: ServedTask,
    rows: Dataset,
    on_progress: OnProgress | None = None,
    answer: AnswerInputs | None = None,
) -> TaskEvaluation:
    """Answer every row's input, and score the answer against the row's right answers by the task's metric.

    If a row has several right answers (column "references"), its score is that of the best one. `answer` answers in
    the model's place, except for measured metrics.

    Raises:
        ConfigError: The task's metric is a function that cannot be used.
    """
    given = given_answers(model, tokenizer, task, rows, on_progress, answer)
    return evaluate_answers(task.schema, rows, [row.text for row in given], confidences_of(given))


class Given(NamedTuple):
    """A model's answer to a row; with a measured metric, the score as text."""

    text: str
    confidence: Confidence | None
    """None: the metric is measured."""


def given_answers(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    task: ServedTask,
    rows: Dataset,
    on_progress: OnProgress | None = None,
    answer: AnswerInputs | None = None,
) -> list[Given]:
    """Answer every row's input, or measure the row's answers; the arguments are those of `evaluate_task`."""
    inputs = list(rows["input"])
    if task.schema.metric == PREFERENCE:
        return [Given(f"{score:.1f}", None) for score in preferred(model, tokenizer, task, rows, on_progress)]
    if task.schema.metric == "loss":
        pairs = [(place, answer) for place, right in enumerate(right_answers(rows)) for answer in all_of(right)]
        shares = token_probabilities(
            model,
            tokenizer,
            task,
            [inputs[place] for place, _ in pairs],
            [answer for _, answer in pairs],
            on_progress if len(pairs) == len(inputs) else None,
        )
        best = [0.0] * len(inputs)
        for (place, _), share in zip(pairs, shares, strict=True):
            best[place] = max(best[place], share)
        return [Given(f"{share:.6f}", None) for share in best]
    answer = answer or partial(answer_inputs, model, tokenizer)
    return [Given(row.text, row.confidence) for row in answer(task, inputs, on_progress)]


def confidences_of(given: Sequence[Given]) -> tuple[Confidence, ...]:
    """The confidences of answers; empty for measured metrics."""
    return tuple(row.confidence for row in given if row.confidence is not None)


def evaluate_answers(
    task: TaskSchema, rows: Dataset, answers: Sequence[str], confidences: tuple[Confidence, ...] = ()
) -> TaskEvaluation:
    """Score given answers to a task's rows; with a measured metric, the scores as texts. For errors see above."""
    references, accepted, is_measured = list(rows["output"]), right_answers(rows), task.metric in MEASURED
    outcomes = score_answers(task.metric, answers, accepted)
    majority_rate, similarity = None, 0.0
    if not is_measured:
        counts = Counter(map(plain_answer, references))
        commonest = max(references, key=lambda reference: counts[plain_answer(reference)], default="")
        majority_rate = _mean(score_answers(task.metric, [commonest] * len(references), accepted))
        similarity = _mean(
            [
                max(rouge1(answer, reference) for reference in all_of(right))
                for answer, right in zip(answers, accepted, strict=True)
            ]
        )
    return TaskEvaluation(
        task=task.name,
        accuracy=_mean(outcomes),
        rouge1=similarity,
        num_rows=len(references),
        majority_rate=majority_rate,
        answers=tuple(answers),
        outcomes=outcomes,
        labels=tuple(label_figures(answers, references, task.labels)) if task.labels and not is_measured else (),
        confidences=confidences,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def count_too_long(
    tokenizer: PreTrainedTokenizerBase, task: ServedTask, accepted: Sequence[str | Sequence[str]]
) -> int:
    """Count the rows all of whose right answers have more tokens than an answer may have; no answer can match them."""
    longest = task.max_new_tokens + 1  # with the end token

    def is_too_long(answer: str) -> bool:
        return len(encode_answer(tokenizer, task.schema, answer, longest + 1)) > longest

    return sum(all(map(is_too_long, all_of(right))) for right in accepted)
