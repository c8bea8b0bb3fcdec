"""Questions about texts of a task with labels, whose targets are a model's own answers, re-centred.

A version that learned a new task often answers some labels of an old task too often. An offset per label takes that
away (`deal_core.evaluation.recentring`). The targets here are q = softmax(log p + offset). The texts' own labels are
not learned; only how often each label occurs among them is used.

Shapes: N texts, L labels, K tokens of a label, M tokens that begin one of the labels.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import softmax
from transformers import PreTrainedTokenizerBase

from deal_core.base_model.language_model import LanguageModel
from deal_core.data.prompts import encode_answer, encode_prompt
from deal_core.errors import TrainingDivergedError
from deal_core.evaluation.label_scores import Floats, label_scores
from deal_core.evaluation.recentring import label_offsets
from deal_core.strategies.rehearsal import Question
from deal_core.strategies.strategy import TaskTexts


def recentred_questions(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: TaskTexts,
    generator: random.Random,
    label_weight: float = 0.0,
) -> tuple[list[Question], float]:
    """Return a question for each text, and the share of the answers that had a label which others should have had.

    Args:
        model: The model whose answers are the targets.
        tokenizer: Its tokenizer.
        texts: Texts of one task with labels, with their right labels.
        generator: Draws the label that is the answer.
        label_weight: β. The target is (1 − β) · the model's re-centred answer + β · the right label.

    Raises:
        TrainingDivergedError: The model's scores are not finite.
    """
    task, limit = texts.task, texts.max_prompt_tokens
    log_probs_NL, targets_N = label_scores(model, tokenizer, task, texts.rows, max_prompt_tokens=limit)
    if not np.isfinite(log_probs_NL).all():
        raise TrainingDivergedError(
            f"The adapter scores labels of {task.name} with numbers that are not finite: its training diverged. Lower "
            "train.learning_rate. If the champion diverged, take an earlier version: deal version rollback."
        )
    goals_NL = softmax(log_probs_NL + label_offsets(log_probs_NL, targets_N), axis=1)
    goals_NL = (1 - label_weight) * goals_NL + label_weight * np.eye(len(task.labels))[targets_N]
    labels = [encode_answer(tokenizer, task, label, limit) for label in task.labels]
    prompts = [encode_prompt(tokenizer, task, text, limit) for text in texts.rows["input"]]
    questions = [question(prompt, labels, goal_L, generator) for prompt, goal_L in zip(prompts, goals_NL, strict=True)]
    return questions, _shift(log_probs_NL, targets_N)


def _shift(log_probs_NL: Floats, targets_N: NDArray[np.int64]) -> float:
    """The total variation between the labels' shares in the answers and among the texts."""
    num_texts, num_labels = log_probs_NL.shape
    shares_L, true_L = (
        np.bincount(each, minlength=num_labels) / num_texts for each in (log_probs_NL.argmax(1), targets_N)
    )
    return float(np.abs(shares_L - true_L).sum() / 2)


def question(
    prompt_ids: Sequence[int], labels: Sequence[Sequence[int]], goal_L: Floats, generator: random.Random
) -> Question:
    """Return a question whose answer is a label drawn with the probabilities `goal_L`.

    The targets at each token of the answer are the probabilities of all tokens that continue a label which begins as
    the answer does. So the expected loss is KL(goal ‖ model) over the labels, by the chain rule.
    """
    (answer_ids,) = ([*each] for each in generator.choices(labels, goal_L.tolist()))
    steps: list[dict[int, float]] = []
    for place in range(len(answer_ids)):
        chances: dict[int, float] = {}
        for label, goal in zip(labels, goal_L, strict=True):
            if len(label) > place and list(label[:place]) == answer_ids[:place]:
                chances[label[place]] = chances.get(label[place], 0.0) + float(goal)
        steps.append(chances)
    width = max(map(len, steps))
    tokens_KM, shares_KM = torch.zeros(len(steps), width, dtype=torch.long), torch.zeros(len(steps), width)
    for place, chances in enumerate(steps):
        tokens_KM[place, : len(chances)] = torch.tensor(list(chances))
        shares_KM[place, : len(chances)] = torch.tensor(list(chances.values())) / sum(chances.values())
    return Question(prompt_ids, answer_ids, tokens_KM, shares_KM)
