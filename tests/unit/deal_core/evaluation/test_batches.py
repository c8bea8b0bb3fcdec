"""Batches of rows: as many tokens as the device takes, and fewer rows when its memory runs out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset

from deal_core.base_model.load import BaseModel
from deal_core.data.schema import TaskSchema
from deal_core.evaluation import batches
from deal_core.evaluation.batches import MAX_BATCH_TOKENS, batch_tokens, in_batches
from deal_core.evaluation.generation import answer_inputs
from tests.unit.deal_core.conftest import as_served

OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB."


@dataclass
class SmallMemory:
    """Reads batches of at most `num_rows` rows."""

    num_rows: int
    error: str = OUT_OF_MEMORY

    def __call__(self, batch: list[int]) -> int:
        if len(batch) > self.num_rows:
            raise RuntimeError(self.error)
        return len(batch)


def test_batches_have_rows_of_similar_length_and_at_most_so_many_tokens(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "MAX_BATCH_TOKENS", 20)
    found = [batch for batch, _ in in_batches(base.model, [5, 30, 10, 4, 5, 9], len)]
    assert found == [[1], [2, 5], [0, 4, 3]], "a longer row is read alone"
    limited = [batch for batch, _ in in_batches(base.model, [5, 5, 5], len, max_rows=2)]
    assert limited == [[0, 1], [2]]


def test_a_batch_that_does_not_fit_is_divided_and_later_ones_stay_as_small(base: BaseModel) -> None:
    found = list(in_batches(base.model, [8] * 21, SmallMemory(5)))
    assert [row for batch, _ in found for row in batch] == list(range(21)), "each row once"
    assert [size for _, size in found] == [5, 5, 5, 5, 1]


def test_other_errors_and_a_single_row_that_does_not_fit_are_raised(base: BaseModel) -> None:
    with pytest.raises(RuntimeError, match="out of memory"):
        list(in_batches(base.model, [8, 8], SmallMemory(0)))
    with pytest.raises(RuntimeError, match="shapes"):
        list(in_batches(base.model, [8, 8], SmallMemory(1, error="shapes do not fit")))


def test_answers_are_the_same_when_memory_runs_out(
    base: BaseModel, task: TaskSchema, rows: Callable[..., Dataset]
) -> None:
    inputs, sizes = rows(12)["input"], list[int]()
    expected = answer_inputs(base.model, base.tokenizer, as_served(task, 6), inputs)

    def fail(_: Any, args: Any, options: dict[str, Any]) -> None:
        num_rows = len(options["input_ids"])
        if num_rows > 4:
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)
        sizes.append(num_rows)

    with base.model.model.register_forward_pre_hook(fail, with_kwargs=True):
        found = answer_inputs(base.model, base.tokenizer, as_served(task, 6), inputs)
    assert [answer.text for answer in found] == [answer.text for answer in expected]
    assert max(sizes) == 3, "half of half of twelve"


def test_an_accelerator_reads_more_tokens_the_more_memory_it_has(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert batch_tokens(base.model) == MAX_BATCH_TOKENS
    shape = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
    monkeypatch.setattr(batches, "device_of", lambda model: torch.device("cuda"))

    def tokens(gigabytes: int, num_key_value_heads: int) -> int:
        memory = SimpleNamespace(total_memory=gigabytes * 10**9)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
        text = SimpleNamespace(**shape, num_key_value_heads=num_key_value_heads)
        model: Any = SimpleNamespace(
            parameters=lambda: iter([torch.zeros(1, dtype=torch.bfloat16)]),
            config=SimpleNamespace(get_text_config=lambda: text),
        )
        return batch_tokens(model)

    assert tokens(80, 8) == pytest.approx(2 * tokens(40, 8), abs=1) and tokens(80, 8) > tokens(80, 32)
    keys_and_values = 2 * 2 * 32 * 8 * 128
    assert 32 * MAX_BATCH_TOKENS > tokens(80, 8) > 8 * MAX_BATCH_TOKENS
    assert tokens(80, 8) * keys_and_values < 20e9, "a quarter of the memory"
    assert tokens(1, 32) == MAX_BATCH_TOKENS
