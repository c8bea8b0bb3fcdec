"""Questions whose targets are a model's own answers: as it writes them, or labels whose answers are re-centred.

A version that learned a new task often answers some labels of an old task too often. An offset per label takes that
away (`deal_core.evaluation.label_scores`). The targets are then q = softmax(log p + offset). The texts' own labels are
not learned; only how often each label occurs among them is used.

Shapes: N texts, L labels, K tokens of an answer, M tokens that begin one of the labels, B prompts, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch
from peft import PeftModel
from scipy.special import softmax
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from deal_core.base_model.language_model import LanguageModel
from deal_core.data.prompts import encode_answer, encode_prompt
from deal_core.data.schema import TaskSchema
from deal_core.errors import TrainingDivergedError
from deal_core.evaluation.generation import answer_limit, generate
from deal_core.evaluation.label_scores import Floats, label_offsets, label_scores
from deal_core.strategies.rehearsal import Question, with_target
from deal_core.strategies.strategy import TaskContext, TaskTexts


def answered(
    model: PeftModel,
    context: TaskContext,
    asked: Sequence[tuple[TaskSchema, list[str]]],
    *,
    max_prompt_tokens: int,
    max_new_tokens: int,
    temperature: float = 1.0,
) -> list[Question]:
    """Questions about texts under each task's instruction, with the model's answers, in the order of the texts."""
    tokenizer = context.base.tokenizer
    prompts: list[list[int]] = []
    limits: list[int] = []
    for task, texts in asked:
        prompts += [encode_prompt(tokenizer, task, text, max_prompt_tokens) for text in texts]
        limits += [answer_limit(tokenizer, task, max_new_tokens)] * len(texts)
    questions: dict[int, Question] = {}
    end = tokenizer.eos_token_id
    for batch, answers, logits_BKV in generate(model, tokenizer, prompts, max(limits, default=1), with_logits=True):
        assert logits_BKV is not None
        for i, answer, logits_KV in zip(batch, answers, logits_BKV, strict=True):
            ids = answer[: limits[i]]
            if end in ids:  # what stands behind the end token is padding
                ids = ids[: ids.index(end) + 1]
            questions[i] = with_target(Question(prompts[i], ids), logits_KV[: len(ids)], temperature)
    return [questions[i] for i in range(len(prompts))]


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
    task, limit, num_labels = texts.task, texts.max_prompt_tokens, len(texts.task.labels)
    log_probs_NL, targets_N = label_scores(model, tokenizer, task, texts.rows, max_prompt_tokens=limit)
    if not np.isfinite(log_probs_NL).all():
        raise TrainingDivergedError(
            f"The adapter scores labels of {task.name} with numbers that are not finite: its training diverged. Lower "
            "train.learning_rate. If the champion diverged, take an earlier version: deal version rollback."
        )
    goals_NL = softmax(log_probs_NL + label_offsets(log_probs_NL, targets_N), axis=1)
    goals_NL = (1 - label_weight) * goals_NL + label_weight * np.eye(num_labels)[targets_N]
    labels = [encode_answer(tokenizer, task, label, limit) for label in task.labels]
    prompts = [encode_prompt(tokenizer, task, text, limit) for text in texts.rows["input"]]
    questions = [question(prompt, labels, goal_L, generator) for prompt, goal_L in zip(prompts, goals_NL, strict=True)]
    # the total variation between the labels' shares in the answers and among the texts
    shares_L, true_L = (
        np.bincount(places_N, minlength=num_labels) / len(targets_N) for places_N in (log_probs_NL.argmax(1), targets_N)
    )
    return questions, float(np.abs(shares_L - true_L).sum() / 2)


def question(
    prompt_ids: Sequence[int], labels: Sequence[Sequence[int]], goal_L: Floats, generator: random.Random
) -> Question:
    """Return a question whose answer is a label drawn with the probabilities `goal_L`.

    The targets at each token of the answer are the probabilities of all tokens that continue a label which begins as
    the answer does. So the expected loss is KL(goal ‖ model) over the labels, by the chain rule.
    """
    answer_ids = list(generator.choices(labels, goal_L.tolist())[0])
    steps: list[dict[int, float]] = []
    for place in range(len(answer_ids)):
        chances: dict[int, float] = {}
        for label, goal in zip(labels, goal_L, strict=True):
            if len(label) > place and list(label[:place]) == answer_ids[:place]:
                chances[label[place]] = chances.get(label[place], 0.0) + float(goal)
        steps.append(chances)
    tokens = [torch.tensor(list(chances)) for chances in steps]
    shares = [torch.tensor(list(chances.values())) / sum(chances.values()) for chances in steps]
    return Question(
        prompt_ids, answer_ids, pad_sequence(tokens, batch_first=True), pad_sequence(shares, batch_first=True)
    )
