"""The largest batch of a run: from the rows themselves where there is a tokenizer, else from the spec's limits."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from deal_core.config import TrainConfig
from deal_core.data.prompts import encode_answer, encode_prompt
from deal_core.data.schema import TaskSchema
from deal_core.planning.memory import BatchShape
from deal_core.strategies.questions import tasks_to_ask

NUM_LONGEST = 64
"""Rows that are tokenised: those with the most characters."""


def limits_of(train: TrainConfig, num_rows: int) -> BatchShape:
    """Return the largest batch that the settings allow."""
    return BatchShape(
        num_rows=num_rows, num_tokens=train.max_prompt_tokens + train.max_answer_tokens,
        num_answer_tokens=train.max_answer_tokens,
    )  # fmt: skip


def longest_of(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    task: TaskSchema,
    old_tasks: Sequence[TaskSchema],
    train: TrainConfig,
    num_rows: int,
) -> BatchShape:
    """Return a batch of the longest rows.

    Args:
        rows: Training rows, columns input and output.
        tokenizer: The base model's.
        task: How a row becomes a prompt.
        old_tasks: What the rows' texts are also asked about, while they are learned.
        train: Limits of prompts and answers.
        num_rows: Rows of the batch.

    Raises:
        ConfigError: A prompt is too long even without its text.
    """
    asked = tasks_to_ask(old_tasks, task)
    inputs = heapq.nlargest(NUM_LONGEST, rows["input"], key=len)
    outputs = heapq.nlargest(NUM_LONGEST, rows["output"], key=len)
    prompts = [len(encode_prompt(tokenizer, each, text, train.max_prompt_tokens))
               for each in (task, *asked) for text in inputs]  # fmt: skip
    answers = [len(encode_answer(tokenizer, task, text, train.max_answer_tokens)) for text in outputs]
    for old in asked:
        answers += [len(encode_answer(tokenizer, old, label, train.max_answer_tokens)) for label in old.labels]
        answers += [] if old.labels else [train.max_answer_tokens]
    return BatchShape(num_rows=num_rows, num_tokens=max(prompts) + max(answers), num_answer_tokens=max(answers))
