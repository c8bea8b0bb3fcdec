"""Offsets take a preference for some labels away."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import log_softmax

from benchmarks.method.protocol import constrained_accuracy, ranking_auc
from deal_core.evaluation.recentring import PRIOR_ROWS, label_offsets, offsets, recentred_accuracy


def scored(num_rows: int = 900, signal: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of three labels for rows that are half label 0, a third label 1 and a sixth label 2."""
    random = np.random.default_rng(0)
    targets = random.choice(3, num_rows, p=[1 / 2, 1 / 3, 1 / 6])
    scores = random.normal(size=(num_rows, 3))
    scores[np.arange(num_rows), targets] += signal
    return log_softmax(scores, axis=1), targets


def test_a_favoured_label_costs_accuracy_but_no_knowledge():
    log_probs, targets = scored()
    shifted = log_softmax(log_probs + np.array([0.0, 0.0, 4.0]), axis=1)
    assert constrained_accuracy(shifted, targets) < constrained_accuracy(log_probs, targets) - 0.3
    assert recentred_accuracy(shifted, targets) == pytest.approx(recentred_accuracy(log_probs, targets), abs=1e-3)
    assert ranking_auc(shifted, targets) == pytest.approx(ranking_auc(log_probs, targets))


def test_without_signal_nothing_is_known():
    log_probs, targets = scored(signal=0.0)
    assert recentred_accuracy(log_probs, targets) == pytest.approx(1 / 4 + 1 / 9 + 1 / 36, abs=0.05)
    assert ranking_auc(log_probs, targets) == pytest.approx(0.5, abs=0.05)


def test_the_offsets_reach_the_shares():
    log_probs, _ = scored()
    goal = np.array([0.2, 0.2, 0.6])
    shifted = np.exp(log_softmax(log_probs + offsets(log_probs, goal), axis=1))
    assert shifted.mean(0) == pytest.approx(goal, abs=1e-4)


def test_offsets_to_answer_with_take_most_of_a_preference_away():
    log_probs, targets = scored()
    shifted = log_softmax(log_probs + np.array([0.0, 0.0, 4.0]), axis=1)
    choices = (shifted + label_offsets(shifted, targets)).argmax(1)
    assert (choices == targets).mean() == pytest.approx(recentred_accuracy(log_probs, targets), abs=0.02)


@pytest.mark.parametrize(("num_rows", "weight"), [(PRIOR_ROWS, 1 / 2), (9 * PRIOR_ROWS, 9 / 10)])
def test_few_rows_give_small_offsets(num_rows, weight):
    """A label without rows, such as one that was added, gets the mean offset."""
    log_probs, _ = scored(num_rows)
    targets = np.arange(num_rows) % 2
    found = label_offsets(log_probs, targets)
    counts = np.bincount(targets) + 1
    assert found[:2] == pytest.approx(weight * offsets(log_probs[:, :2], counts / counts.sum()))
    assert found[2] == 0 and found.sum() == pytest.approx(0)


def test_one_row_is_answered_without_offsets():
    log_probs = np.log([[0.1, 0.7, 0.2]])
    assert recentred_accuracy(log_probs, np.array([1])) == 1
    assert recentred_accuracy(log_probs, np.array([0])) == 0
