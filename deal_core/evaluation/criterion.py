"""Where a model draws the line between labels: recall per label, share of each answer, and accuracy without a bias.

A model can know a task and still answer one label too often. Accuracy then falls although nothing was forgotten. The
figures here separate the two: `recentred_accuracy` and `ranking_auc` do not change when one label is favoured.

Shapes: N rows, L labels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax
from sklearn.metrics import roc_auc_score

Floats = NDArray[np.float64]

NUM_ROUNDS = 200
"""Rounds of the fixed point that finds the labels' offsets; it settles within some dozens."""
DAMPING = 0.7
"""Share of each round's correction that is applied."""
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


def label_figures(answers: Sequence[str], references: Sequence[str], labels: Sequence[str]) -> list[LabelFigures]:
    """Return the figures of every label in the schema's order; answers outside the labels come last, if there are any.

    Answers and labels are compared as accuracy compares them: stripped and case-folded.
    """
    answered = [_plain(answer) for answer in answers]
    expected = [_plain(reference) for reference in references]
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
        for name in (_plain(label),)
    ]
    outside = len(answered) - sum(given[_plain(label)] for label in labels)
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


def constrained_accuracy(log_probs_NL: Floats, targets_N: NDArray[np.int64]) -> float:
    """Accuracy if only labels may be answered."""
    return float((log_probs_NL.argmax(1) == targets_N).mean())


def recentred_accuracy(log_probs_NL: Floats, targets_N: NDArray[np.int64]) -> float:
    """Accuracy if every label is answered as often as it occurs.

    An offset per label is found on one half of the rows, from their log-probabilities and the share of each label, and
    applied to the other half; then the halves change places. The rows' own labels are not used. This is Batch
    Calibration (arXiv 2309.17249) with the labels' shares instead of equal ones.
    """
    halves = np.arange(len(targets_N)) % 2
    right = 0
    for half in (0, 1):
        fit, apply = halves != half, halves == half
        offsets_L = offsets(log_probs_NL[fit], _shares(targets_N[fit], log_probs_NL.shape[1]))
        right += int(((log_probs_NL[apply] + offsets_L).argmax(1) == targets_N[apply]).sum())
    return right / max(1, len(targets_N))


def offsets(log_probs_NL: Floats, shares_L: Floats) -> Floats:
    """Return b with mean over rows of softmax(log p + b) = shares; labels with share 0 get no answers."""
    goal_L = np.maximum(shares_L, 1e-6)
    offsets_L: Floats = np.zeros(log_probs_NL.shape[1])
    for _ in range(NUM_ROUNDS):
        mean_L = softmax(log_probs_NL + offsets_L, axis=1).mean(0)
        offsets_L += DAMPING * (np.log(goal_L) - np.log(np.maximum(mean_L, 1e-12)))
    centred_L: Floats = offsets_L - offsets_L.mean()
    return centred_L


def ranking_auc(log_probs_NL: Floats, targets_N: NDArray[np.int64]) -> float | None:
    """Area under the ROC curve, averaged over pairs of labels (Hand and Till, 2001); None with fewer than two labels.

    For a pair, rows of both labels are ranked by the difference of the two log-probabilities.
    """
    present = np.unique(targets_N)
    areas = []
    for i, first in enumerate(present):
        for second in present[i + 1 :]:
            of_pair = (targets_N == first) | (targets_N == second)
            scores = log_probs_NL[of_pair, second] - log_probs_NL[of_pair, first]
            areas.append(roc_auc_score(targets_N[of_pair] == second, scores))
    return float(np.mean(areas)) if areas else None


def _shares(targets_N: NDArray[np.int64], num_labels: int) -> Floats:
    counts_L: Floats = np.bincount(targets_N, minlength=num_labels).astype(np.float64)
    return counts_L / max(1, len(targets_N))


def _plain(text: str) -> str:
    return text.strip().casefold()
