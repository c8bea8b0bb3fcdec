"""Answer a labelled task without a preference for some of its labels.

A model can know a task and still answer one label too often. Its accuracy then falls although nothing was forgotten. An
offset per label takes the preference away: the answer is argmax(log p(label | prompt) + offset). This is Batch
Calibration (arXiv 2309.17249) with the labels' shares among the test rows instead of equal ones.

Shapes: N rows, L labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax
from transformers import PreTrainedTokenizerBase

from deal_core.config import EvaluateConfig
from deal_core.evaluation.answering import ServedTask
from deal_core.evaluation.generation import Confidence, GivenAnswer, LanguageModel, OnProgress, answer_inputs
from deal_core.evaluation.label_scores import Floats, label_log_probs

NUM_ROUNDS = 200
"""Rounds of the fixed point that finds the offsets; it settles within some dozens."""
DAMPING = 0.7
"""Share of each round's correction that is applied."""
PRIOR_ROWS = 10
"""Rows that speak for no offset: with as many rows of its own, a task gets half of its offsets."""

Fit = Callable[[Floats, NDArray[np.int64]], Floats]
"""A function from log-probabilities (N, L) and the rows' labels (N) to offsets (L)."""


def offsets(log_probs_NL: Floats, shares_L: Floats) -> Floats:
    """Return b with mean over rows of softmax(log p + b) = shares; labels with share 0 get no answers."""
    goal_L = np.maximum(shares_L, 1e-6)
    offsets_L: Floats = np.zeros(log_probs_NL.shape[1])
    for _ in range(NUM_ROUNDS):
        mean_L = softmax(log_probs_NL + offsets_L, axis=1).mean(0)
        offsets_L += DAMPING * (np.log(goal_L) - np.log(np.maximum(mean_L, 1e-12)))
    centred_L: Floats = offsets_L - offsets_L.mean()
    return centred_L


def label_offsets(log_probs_NL: Floats, targets_N: NDArray[np.int64]) -> Floats:
    """Return the offsets to answer with. Only the shares of the labels `targets_N` count, not whose label is which.

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


def recentred_scores(
    log_probs_NL: Floats, targets_N: NDArray[np.int64], halves_N: NDArray[np.int64], fit: Fit = label_offsets
) -> Floats:
    """Return log p + offset of every row and label. The offsets of a row come from the rows of the other half, 0 or 1.

    Without rows in the other half, a row has no offsets.
    """
    scores_NL = log_probs_NL.copy()
    for half in (0, 1):
        others = halves_N != half
        if others.any():
            scores_NL[~others] += fit(log_probs_NL[others], targets_N[others])
    return scores_NL


def recentred_accuracy(log_probs_NL: Floats, targets_N: NDArray[np.int64]) -> float:
    """Accuracy if every label is answered as often as it occurs. It does not change if one label is favoured."""
    scores_NL = recentred_scores(log_probs_NL, targets_N, np.arange(len(targets_N)) % 2, _full_offsets)
    return float((scores_NL.argmax(1) == targets_N).sum() / max(1, len(targets_N)))


def _full_offsets(log_probs_NL: Floats, targets_N: NDArray[np.int64]) -> Floats:
    counts_L = np.bincount(targets_N, minlength=log_probs_NL.shape[1])
    return offsets(log_probs_NL, counts_L / max(1, len(targets_N)))


def answer_task(
    model: LanguageModel, tokenizer: PreTrainedTokenizerBase, task: ServedTask, inputs: Sequence[str],
    on_progress: OnProgress | None = None,
) -> list[GivenAnswer]:
    """Answer every input as the version serves the task: greedily, or with the label of the largest score."""
    config = EvaluateConfig(max_new_tokens=task.max_new_tokens)
    if not task.label_offsets:
        return answer_inputs(
            model, tokenizer, task.schema, inputs, config, max_prompt_tokens=task.max_prompt_tokens,
            on_progress=on_progress,
        )  # fmt: skip
    log_probs_NL = label_log_probs(
        model, tokenizer, task.schema, inputs, config, max_prompt_tokens=task.max_prompt_tokens,
        on_progress=on_progress,
    ).double().numpy()  # fmt: skip
    return best_labels(task.schema.labels, log_probs_NL, log_probs_NL + np.array(task.label_offsets))


def best_labels(labels: Sequence[str], log_probs_NL: Floats, scores_NL: Floats) -> list[GivenAnswer]:
    """Return the label of each row's largest score as its answer.

    The confidence of an answer is its share among the labels by their scores. The mass is what all labels have together
    by their log-probabilities.
    """
    shares_NL, masses_N = softmax(scores_NL, axis=1), np.exp(log_probs_NL).sum(1)
    return [
        GivenAnswer(labels[shares.argmax()], Confidence(float(shares.max()), float(min(1.0, mass))), is_cut=False)
        for shares, mass in zip(shares_NL, masses_N, strict=True)
    ]
