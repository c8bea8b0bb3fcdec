"""The replay buffer: rows that a version keeps of each task it has learned, as tensors of the method's state."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from deal_core.adapter.files import KEPT_ROWS
from deal_core.data.collate import REJECTED_IDS
from deal_core.data.order import stratified_sample
from deal_core.data.schema import TaskSchema
from deal_core.method_config import RehearsalConfig
from deal_core.strategies.rehearsal import RehearsedRow
from deal_core.strategies.strategy import KeptSize, TaskContext


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
    places = stratified_sample([tuple(pair[0].answer_ids) for pair in pairs], num_rows, seed)
    return {**kept, rows_name(context.task.name): pack([row for place in places for row in pairs[place]])}


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


def sizes_of(kept: Mapping[str, Tensor], tasks: Iterable[str]) -> dict[str, KeptSize]:
    """Return the size of each task's kept rows; tasks without rows are left out."""
    sizes = {}
    for task in tasks:
        if rows := rows_of(kept, task):
            longest_prompt = max(len(row.prompt_ids) for row in rows)
            sizes[task] = KeptSize(len(rows), longest_prompt, max(len(row.answer_ids) for row in rows))
    return sizes
