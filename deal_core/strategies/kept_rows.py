"""Rows that a version keeps of each task it has learned, and what a later training learns from them.

The target of a kept row is (1 − β) · the parent version's answer + β · the right answer. The parent's answers to
labelled rows are calibrated first: a version that has just learned a task often answers some labels of an old task too
often, and an offset per label takes that away (`deal_core.evaluation.label_scores`).

Shapes: N rows, L labels, K tokens of an answer, M tokens that continue some label, V vocabulary.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Hashable, Iterable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from scipy.special import softmax
from torch import Tensor
from torch.nn.functional import one_hot
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from deal_core.adapter.files import KEPT_ROWS
from deal_core.data.collate import REJECTED_IDS
from deal_core.data.order import spread
from deal_core.data.prompts import encode_answer
from deal_core.data.schema import TaskSchema
from deal_core.errors import TrainingDivergedError
from deal_core.evaluation.label_scores import Floats, label_offsets, score_labels
from deal_core.method_config import RehearsalConfig
from deal_core.strategies.rehearsal import RehearsedRow, with_model_targets
from deal_core.strategies.strategy import KeptRows, TaskContext


def rows_name(task: str) -> str:
    """Return the name of the tensor that holds the kept rows of a task."""
    return f"{KEPT_ROWS}{hashlib.sha256(task.encode()).hexdigest()[:16]}"


def keep_rows(
    config: RehearsalConfig, context: TaskContext, kept: Mapping[str, Tensor], seed: int
) -> dict[str, Tensor]:
    """Return the kept rows of all tasks, with those of the task just learned; empty if no rows are kept.

    The rows of a task that returns are drawn from the kept ones and the new ones together. Of a preference, both
    answers are kept.
    """
    if not config.rows:
        return {}
    encoded, earlier = context.encoded, rows_of(kept, context.task.name)
    new = [RehearsedRow(row["prompt_ids"], row["answer_ids"]) for row in encoded]
    pairs: list[tuple[RehearsedRow, ...]]
    if context.task.learns_preferences:  # pairs of a better and a worse answer
        worse = [RehearsedRow(row["prompt_ids"], row[REJECTED_IDS]) for row in encoded]
        pairs = [*zip(earlier[::2], earlier[1::2], strict=True), *zip(new, worse, strict=True)]
    else:
        pairs = [(row,) for row in (*earlier, *new)]
    num_rows = max(config.num_kept(len(pairs)), min(config.rows, len(pairs) - len(new)))
    places = choose_rows([tuple(pair[0].answer_ids) for pair in pairs], num_rows, seed)
    return {**kept, rows_name(context.task.name): pack([row for place in places for row in pairs[place]])}


def choose_rows(answers: Sequence[Hashable], num_rows: int, seed: int) -> list[int]:
    """Return the places of `num_rows` rows, at random with every answer in its share, given all rows' answers."""
    generator = random.Random(seed)
    places = generator.sample(range(len(answers)), len(answers))
    return [places[i] for i in spread([answers[place] for place in places], generator.random)[:num_rows]]


def pack(rows: Sequence[RehearsedRow]) -> Tensor:
    """Write prompts and answers as one tensor of integers, for a method's state."""
    flat = [
        number
        for row in rows
        for number in (len(row.prompt_ids), len(row.answer_ids), *row.prompt_ids, *row.answer_ids)
    ]
    return torch.tensor(flat, dtype=torch.int32)


def unpack(packed: Tensor) -> list[RehearsedRow]:
    """Read the rows back from a tensor that `pack` wrote."""
    numbers, rows, at = packed.tolist(), [], 0
    while at < len(numbers):
        num_prompt, num_answer = numbers[at : at + 2]
        middle, end = at + 2 + num_prompt, at + 2 + num_prompt + num_answer
        rows.append(RehearsedRow(numbers[at + 2 : middle], numbers[middle:end]))
        at = end
    return rows


def rows_of(kept: Mapping[str, Tensor], task: str) -> list[RehearsedRow]:
    """Return the kept rows of a task; empty if there are none. `deal data delete` empties the rows of a task."""
    packed = kept.get(rows_name(task))
    return [] if packed is None else unpack(packed)


def right_rows(kept: Mapping[str, Tensor], task: TaskSchema) -> list[RehearsedRow]:
    """Return the kept rows of a task whose answers are right ones; of a preference, those of the better answers."""
    rows = rows_of(kept, task.name)
    return rows[::2] if task.learns_preferences else rows


def sizes_of(kept: Mapping[str, Tensor], tasks: Iterable[str]) -> dict[str, KeptRows]:
    """Return the size of each task's kept rows; tasks without rows are left out."""
    sizes = {}
    for task in tasks:
        if rows := rows_of(kept, task):
            longest_prompt = max(len(row.prompt_ids) for row in rows)
            sizes[task] = KeptRows(len(rows), longest_prompt, max(len(row.answer_ids) for row in rows))
    return sizes


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
