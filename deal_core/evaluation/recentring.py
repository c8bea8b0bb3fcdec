"""Offsets that take a preference for some labels of a task away.

A model can know a task and still answer one label too often. Its accuracy then falls although nothing was forgotten. An
offset per label takes the preference away: the answer is argmax(log p(label | prompt) + offset). This is Batch
Calibration (arXiv 2309.17249) with the labels' true shares instead of equal ones.
`deal_core.training.recentre` lets an adapter learn the offsets.

Shapes: N rows, L labels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from deal_core.evaluation.label_scores import Floats

NUM_ROUNDS = 200
"""Most rounds of the fixed point that finds the offsets; it settles within some dozens."""
TOLERANCE = 1e-7
"""The rounds end when no offset changes by more."""
DAMPING = 0.7
"""Share of each round's correction that is applied."""
PRIOR_ROWS = 10
"""Rows that speak for no offset: with as many rows of its own, a task gets half of its offsets."""


def offsets(log_probs_NL: Floats, shares_L: Floats) -> Floats:
    """Return b with mean over rows of softmax(log p + b) = shares; labels with share 0 get no answers."""
    goal_L = np.maximum(shares_L, 1e-6)
    offsets_L: Floats = np.zeros(log_probs_NL.shape[1])
    for _ in range(NUM_ROUNDS):
        mean_L = softmax(log_probs_NL + offsets_L, axis=1).mean(0)
        change_L = DAMPING * (np.log(goal_L) - np.log(np.maximum(mean_L, 1e-12)))
        offsets_L += change_L
        if np.abs(change_L).max() <= TOLERANCE:
            break
    centred_L: Floats = offsets_L - offsets_L.mean()
    return centred_L


def label_offsets(log_probs_NL: Floats, targets_N: NDArray[np.int64]) -> Floats:
    """Return the offsets to learn. Only the shares of the labels `targets_N` count, not whose label is which.

    Few rows give smaller offsets. Every label counts once more than it occurs. A label without rows has offset 0, the
    mean of the others: it may be too new to have test rows.
    """
    num_rows, num_labels = log_probs_NL.shape
    counts_L = np.bincount(targets_N, minlength=num_labels)
    is_there_L = counts_L > 0
    shares_L = (counts_L[is_there_L] + 1) / (num_rows + is_there_L.sum())
    offsets_L: Floats = np.zeros(num_labels)
    offsets_L[is_there_L] = num_rows / (num_rows + PRIOR_ROWS) * offsets(log_probs_NL[:, is_there_L], shares_L)
    return offsets_L


def recentred_accuracy(log_probs_NL: Floats, targets_N: NDArray[np.int64]) -> float:
    """Accuracy if every label is answered as often as it occurs. It does not change if one label is favoured."""
    return float(recentred_hits(log_probs_NL, targets_N).sum() / max(1, len(targets_N)))


def recentred_hits(log_probs_NL: Floats, targets_N: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which rows are answered rightly if every label is answered as often as it occurs.

    The offsets of a row come from the rows of the other half. Without rows there, a row has no offsets.
    """
    scores_NL, halves_N = log_probs_NL.copy(), np.arange(len(targets_N)) % 2
    for half in (0, 1):
        others = halves_N != half
        if others.any():
            counts_L = np.bincount(targets_N[others], minlength=log_probs_NL.shape[1])
            scores_NL[~others] += offsets(log_probs_NL[others], counts_L / counts_L.sum())
    return np.asarray(scores_NL.argmax(1) == targets_N)
