"""Accuracy without a bias towards a label, from the log-probabilities of all labels.

A model can know a task and still answer one label too often. Accuracy then falls although nothing was forgotten.
`recentred_accuracy` and `ranking_auc` do not change when one label is favoured.

Shapes: N rows, L labels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

Floats = NDArray[np.float64]

NUM_ROUNDS = 200
"""Rounds of the fixed point that finds the labels' offsets; it settles within some dozens."""
DAMPING = 0.7
"""Share of each round's correction that is applied."""


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
            is_second = targets_N[of_pair] == second
            areas.append(_area(np.sort(scores[~is_second]), scores[is_second]))
    return float(np.mean(areas)) if areas else None


def _area(lower_N: Floats, upper_M: Floats) -> float:
    """Share of pairs in which the upper score is larger, ties as half; the lower scores are sorted."""
    num_below = np.searchsorted(lower_N, upper_M, "left") + np.searchsorted(lower_N, upper_M, "right")
    return float(num_below.mean() / (2 * len(lower_N)))


def _shares(targets_N: NDArray[np.int64], num_labels: int) -> Floats:
    counts_L: Floats = np.bincount(targets_N, minlength=num_labels).astype(np.float64)
    return counts_L / max(1, len(targets_N))
