"""How a version answers each label of a task: recall, share of the answers, and whether one label takes over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from deal_core.evaluation.answer_scores import plain_answer

COLLAPSE_SHARE, COLLAPSE_FACTOR = 0.5, 2.0
"""Answers to a task have collapsed if one label is at least this share of them, and this many times its share of the
references."""


@dataclass(frozen=True, kw_only=True)
class LabelFigures:
    """How one label is answered.

    Attributes:
        label: The label; None stands for all answers that are no label.
        num_rows: Test rows with this label.
        recall: Share of these rows that are answered with it; None without such rows.
        share: Its share of all answers.
    """

    label: str | None
    num_rows: int
    recall: float | None
    share: float


def number_labels(labels: Sequence[str]) -> dict[str, int]:
    """Return the number of each label, by the label as answers are compared."""
    return {plain_answer(label): number for number, label in enumerate(labels)}


def label_figures(answers: Sequence[str], references: Sequence[str], labels: Sequence[str]) -> list[LabelFigures]:
    """Return the figures of every label in the schema's order; answers outside the labels come last, if there are any.

    Answers and labels are compared as accuracy compares them: stripped and case-folded.
    """
    answered = [plain_answer(answer) for answer in answers]
    expected = [plain_answer(reference) for reference in references]
    given, wanted = Counter(answered), Counter(expected)
    right = Counter(answer for answer, reference in zip(answered, expected, strict=True) if answer == reference)
    total = max(1, len(answered))
    found = [
        LabelFigures(
            label=label,
            num_rows=wanted[name],
            recall=right[name] / wanted[name] if wanted[name] else None,
            share=given[name] / total,
        )
        for label in labels
        for name in (plain_answer(label),)
    ]
    outside = len(answered) - sum(given[plain_answer(label)] for label in labels)
    if outside:
        found.append(LabelFigures(label=None, num_rows=0, recall=None, share=outside / total))
    return found


def collapsed(figures: Sequence[LabelFigures]) -> LabelFigures | None:
    """Return the label that has taken over the answers, or None."""
    num_rows = max(1, sum(each.num_rows for each in figures))
    most = max(figures, key=lambda each: each.share, default=None)
    if most is None or most.share < COLLAPSE_SHARE or most.share < COLLAPSE_FACTOR * most.num_rows / num_rows:
        return None
    return most
