"""Offsets take a preference for some labels away, and answers are chosen with them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax

from benchmarks.protocol import constrained_accuracy, ranking_auc
from deal_core.config import EvaluateConfig
from deal_core.data.schema import TaskSchema
from deal_core.evaluation.answering import ServedTask
from deal_core.evaluation.generation import answer_inputs
from deal_core.evaluation.label_scores import label_log_probs
from deal_core.evaluation.recentring import (
    PRIOR_ROWS,
    answer_task,
    label_offsets,
    offsets,
    recentred_accuracy,
    recentred_scores,
)

TASK = ServedTask(
    schema=TaskSchema(name="shades", labels=("red", "dark green", "light blue"), instruction="Which shade is it?"),
    max_prompt_tokens=64, max_new_tokens=8,
)  # fmt: skip
TEXTS = ["rose", "grass and moss in the rain", "sky", "the sea on a day without wind", "ice"]


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


def test_a_row_is_not_answered_by_its_own_label_or_score():
    """Nor by those of any row that shares its offsets."""
    log_probs, targets = scored(40)
    halves = np.arange(40) % 2
    before = recentred_scores(log_probs, targets, halves)
    others, changed = targets.copy(), log_probs.copy()
    others[::4] = 2
    changed[2::2] = log_softmax(changed[2::2] + np.array([9.0, 0.0, 0.0]), axis=1)
    after = recentred_scores(changed, others, halves)
    assert after[0] == pytest.approx(before[0]), "its offsets come from the rows 1, 3, 5, …"
    assert np.abs(after[1::2] - before[1::2]).max() > 1


def test_one_row_is_answered_without_offsets():
    log_probs = np.log([[0.1, 0.7, 0.2]])
    assert recentred_scores(log_probs, np.array([0]), np.array([0])).tolist() == log_probs.tolist()


def test_the_label_with_the_largest_score_is_answered(base):
    scores = label_log_probs(base.model, base.tokenizer, TASK.schema, TEXTS, EvaluateConfig(), max_prompt_tokens=64)
    plain = scores.double().numpy()
    between = np.sort(plain[:, 0] - plain[:, 1])[1:3].mean()  # two texts on one side, three on the other
    task = replace(TASK, label_offsets=(0.0, float(between), -50.0))
    seen: list[int] = []
    given = answer_task(base.model, base.tokenizer, task, TEXTS, seen.append)
    choices = (plain + np.array(task.label_offsets)).argmax(1)
    assert sorted(choices) == [0, 0, 0, 1, 1] and seen == [5]
    assert [each.text for each in given] == [TASK.schema.labels[choice] for choice in choices]
    shares = softmax(plain + np.array(task.label_offsets), axis=1)
    assert [each.confidence.confidence for each in given] == pytest.approx(shares.max(1), abs=1e-4)
    assert [each.confidence.label_mass for each in given] == pytest.approx(np.exp(plain).sum(1), rel=1e-3)
    assert answer_task(base.model, base.tokenizer, task, []) == []


def test_without_offsets_the_model_answers_by_itself(base):
    torch.manual_seed(0)
    config = EvaluateConfig(max_new_tokens=8)
    expected = answer_inputs(base.model, base.tokenizer, TASK.schema, TEXTS, config, max_prompt_tokens=64)
    assert answer_task(base.model, base.tokenizer, TASK, TEXTS) == expected
