"""The rehearsal of `deal`: each old task's kept rows, or else texts of the new task under its instruction.

The target of a kept row is (1 − β) · the parent version's answer + β · the right answer. The parent's answers to
labelled rows are calibrated first: a version that has just learned a task often answers some labels of an old task too
often, and an offset per label takes that away (`deal_core.evaluation.label_scores`).

Texts of the new task have no right answer under an old task's instruction. The parent version answers them, and the new
version is held to these answers (self-distillation).

Shapes: N rows, L labels, K tokens of an answer, V vocabulary.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from scipy.special import softmax
from torch import Tensor
from torch.nn.functional import one_hot
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from deal_core.base_model.turn_ends import stop_ids, tokens_before_end
from deal_core.config import TrainConfig
from deal_core.data.prompts import encode_answer, encode_prompt
from deal_core.data.schema import TaskSchema
from deal_core.errors import TrainingDivergedError
from deal_core.evaluation.generation import answer_limit, generate
from deal_core.evaluation.label_scores import Floats, label_offsets, score_labels
from deal_core.method_config import RehearsalConfig
from deal_core.strategies.kept_rows import rows_of
from deal_core.strategies.rehearsal import Rehearsal, RehearsedRow, with_model_targets
from deal_core.strategies.strategy import PlannedArrival, TaskContext

NUM_TEXTS = 256
"""Texts of the new task that the old tasks are rehearsed on, divided among them. Fewer if the steps use fewer."""
MIN_SHARING = 8
"""With fewer texts per old task, all tasks share batches: a batch per task would be nearly empty."""


def make_rehearsal(
    config: RehearsalConfig,
    model: PeftModel,
    context: TaskContext,
    kept: Mapping[str, Tensor],
    seed: int,
    *,
    answer_weight: float,
) -> Rehearsal | None:
    """Return the rehearsal of an arriving task; None if there is nothing to rehearse.

    Args:
        config: Rows per step.
        model: The parent with its adapter, before any training step.
        context: The arrival.
        kept: The kept rows of the parent's method state.
        seed: Seed of all random choices. It differs from arrival to arrival, so that few steps use other rows.
        answer_weight: β, the weight of the right answers in the targets of kept rows.

    Raises:
        TrainingDivergedError: The parent's scores are not finite.
    """
    generator = random.Random(seed)
    sets: list[list[RehearsedRow]] = []
    others: list[TaskSchema] = []
    for old in context.old_tasks:
        if rows := rows_of(kept, old.name):
            sets.append(with_targets(rows, old, model, context, generator, answer_weight))
        else:
            others.append(old)
    olds = tasks_to_ask(others, context.task)
    num_each = texts_per_task(config, context.num_steps, len(olds))
    sets += about_arrival(model, context, olds, seed, num_each)
    return Rehearsal(sets, context.collator(), num_rows=config.per_step, seed=seed) if sets else None


def with_targets(
    rows: Sequence[RehearsedRow],
    task: TaskSchema,
    model: PeftModel,
    context: TaskContext,
    generator: random.Random,
    answer_weight: float,
) -> list[RehearsedRow]:
    """Return kept rows of a task with what is learned from them.

    Labels: the parent's calibrated probabilities of the labels, mixed with the right label. Free answers and chats: the
    parent's probabilities at the tokens of the right answer, mixed with these tokens. Preferences: the parent's
    probabilities at the tokens of both answers alone.

    Args:
        rows: The kept rows.
        task: Their task, as the parent serves it.
        model: The parent.
        context: The arrival.
        generator: Draws the labels that are answers.
        answer_weight: β.

    Raises:
        TrainingDivergedError: The parent's scores are not finite.
    """
    tokenizer = context.base.tokenizer
    longest = max(context.train.answer_tokens(task.labels), *(len(row.answer_ids) for row in rows))
    labels = [encode_answer(tokenizer, task, label, longest) for label in task.labels]
    numbers = {tuple(label): number for number, label in enumerate(labels)}
    targets = [numbers.get(tuple(row.answer_ids)) for row in rows]
    are_labels = None not in targets  # without labels no answer is one
    are_distinct = len(numbers) == len(labels)
    if task.learns_preferences or not (are_labels and are_distinct):
        weight = 0.0 if task.learns_preferences else answer_weight

        def mixed(logits_KV: Tensor, labels_K: Tensor) -> Tensor:
            return (1 - weight) * logits_KV.softmax(-1) + weight * one_hot(labels_K, logits_KV.shape[-1])

        return with_model_targets(model, context.collator(), rows, mixed)
    prompts, targets_N = [row.prompt_ids for row in rows], np.array(targets)
    return labelled_rows(model, tokenizer, task.name, prompts, labels, targets_N, generator, answer_weight)


def labelled_rows(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    prompts: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    targets_N: NDArray[np.int64],
    generator: random.Random,
    answer_weight: float,
) -> list[RehearsedRow]:
    """Return a row for each prompt: its answer is a label drawn from (1 − β) · calibrated answer + β · right label.

    Args:
        model: Answers the prompts.
        tokenizer: Its tokenizer.
        task: Name of the prompts' task.
        prompts: Tokens of the prompts.
        labels: Tokens of the task's labels.
        targets_N: Number of the right label of each prompt.
        generator: Draws the answers.
        answer_weight: β.

    Raises:
        TrainingDivergedError: The model's scores are not finite.
    """
    log_probs_NL = score_labels(model, tokenizer, prompts, labels).double().numpy()
    if not np.isfinite(log_probs_NL).all():
        raise TrainingDivergedError(
            f"The parent version scores labels of {task} with numbers that are not finite: its training diverged. Take "
            "an earlier version (deal version rollback), and lower train.learning_rate."
        )
    goals_NL = softmax(log_probs_NL + label_offsets(log_probs_NL, targets_N), axis=1)
    goals_NL = (1 - answer_weight) * goals_NL + answer_weight * np.eye(len(labels))[targets_N]
    return [_label_row(prompt, labels, goal_L, generator) for prompt, goal_L in zip(prompts, goals_NL, strict=True)]


def _label_row(
    prompt_ids: Sequence[int], labels: Sequence[Sequence[int]], goal_L: Floats, generator: random.Random
) -> RehearsedRow:
    """Return a row whose answer is a label drawn with the probabilities `goal_L`.

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
    return RehearsedRow(
        prompt_ids, answer_ids, pad_sequence(tokens, batch_first=True), pad_sequence(shares, batch_first=True)
    )


def about_arrival(
    model: PeftModel, context: TaskContext, olds: Sequence[TaskSchema], seed: int, num_each: int
) -> list[list[RehearsedRow]]:
    """Return texts of the new task under each old task's instruction, with the parent's answers."""
    num_rows, train = len(context.rows), context.train
    num_texts = min(num_each, num_rows)
    if not (olds and num_texts):
        return []
    drawn: list[tuple[TaskSchema, list[str]]] = []
    for number, old in enumerate(olds):  # each task has a seed
        places = random.Random(seed + number).sample(range(num_rows), num_texts)
        drawn.append((old, list(context.rows.select(places)["input"])))
    # a task that is asked alone has its instruction computed once for all texts; with few texts, tasks share batches
    groups = [[task] for task in drawn] if num_each >= MIN_SHARING else [drawn]
    sets: list[list[RehearsedRow]] = []
    for group in groups:
        rows = answered(
            model,
            context,
            group,
            max_prompt_tokens=train.max_prompt_tokens,
            max_new_tokens=max(longest_answer(train, old) for old, _ in group),
        )
        sets += [rows[start : start + num_texts] for start in range(0, len(rows), num_texts)]
    return sets


def answered(
    model: PeftModel,
    context: TaskContext,
    texts_of: Sequence[tuple[TaskSchema, Sequence[str]]],
    *,
    max_prompt_tokens: int,
    max_new_tokens: int,
) -> list[RehearsedRow]:
    """Return texts under each task's instruction with the model's own answers as targets, in the order of the texts."""
    tokenizer = context.base.tokenizer
    prompts: list[list[int]] = []
    limits: list[int] = []
    for task, texts in texts_of:
        prompts += [encode_prompt(tokenizer, task, text, max_prompt_tokens) for text in texts]
        limits += [answer_limit(tokenizer, task, max_new_tokens)] * len(texts)
    rows: dict[int, RehearsedRow] = {}
    stops = stop_ids(tokenizer)
    for batch, answers, logits_BKV in generate(model, tokenizer, prompts, max(limits, default=1), with_logits=True):
        assert logits_BKV is not None
        for i, answer, logits_KV in zip(batch, answers, logits_BKV, strict=True):
            ids = answer[: limits[i]]
            if (length := tokens_before_end(ids, stops)) is not None:  # what stands behind the end token is padding
                ids = ids[: length + 1]
            shares_KV = logits_KV[: len(ids)].float().softmax(-1)
            rows[i] = RehearsedRow(prompts[i], ids).with_target(shares_KV)
    return [rows[i] for i in range(len(prompts))]


def tasks_to_ask(olds: Sequence[TaskSchema], new: TaskSchema) -> list[TaskSchema]:
    """Return the old tasks that can be rehearsed on the new task's texts. Of tasks with one wording, one is kept.

    A chat task needs chats, and other tasks need texts. An old task with the new task's wording is left out: its
    prompts would be the new rows' own prompts, with another answer than their label.
    """
    askable = (old for old in olds if (old.format == "chat") == (new.format == "chat"))
    by_wording = {_wording(old): old for old in askable if old.name != new.name}
    by_wording.pop(_wording(new), None)
    return list(by_wording.values())


def _wording(task: TaskSchema) -> tuple[str, frozenset[str], str | None, str]:
    """All parts of a prompt except its text; the order of the options does not count."""
    return task.instruction.strip(), frozenset(task.labels if task.shows_options else ()), task.template, task.prompt


def longest_answer(train: TrainConfig, old: TaskSchema) -> int:
    """Return the most tokens of an old task's answers: the new task's own limit may be shorter."""
    return max(train.answer_tokens(old.labels), TrainConfig().answer_tokens(old.labels))


def texts_per_task(config: RehearsalConfig, num_steps: int, num_tasks: int) -> int:
    """Return how many of the new task's texts each of `num_tasks` old tasks without kept rows is rehearsed on."""
    return math.ceil(min(NUM_TEXTS, config.per_step * num_steps) / max(1, num_tasks))


def num_answered(config: RehearsalConfig, arrival: PlannedArrival) -> int:
    """Return how many texts the parent answers before the first step of an arrival."""
    olds = tasks_to_ask([old for old in arrival.old_tasks if old.name not in arrival.kept], arrival.task)
    num_each = min(texts_per_task(config, arrival.num_steps, len(olds)), arrival.num_rows)
    return sum(rows.num_rows for rows in arrival.kept.values()) + len(olds) * num_each


def not_rehearsed(context: TaskContext, kept: Mapping[str, Tensor]) -> str:
    """Return the names of the old tasks that are not rehearsed, other than the arriving one; empty if all are."""
    others = [old for old in context.old_tasks if not rows_of(kept, old.name)]
    wordings = {_wording(old) for old in tasks_to_ask(others, context.task)}
    return ", ".join(old.name for old in others if old.name != context.task.name and _wording(old) not in wordings)
