"""How steps are computed: each choice gives the same training within rounding, and none of them stays on the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from torch._dynamo.testing import CompileCounter

from deal_core.adapter.state import attach_adapter
from deal_core.base_model.load import BaseModel
from deal_core.config import AdapterConfig, TrainConfig
from deal_core.data import collate
from deal_core.data.collate import (
    ANSWER_POSITIONS,
    IGNORED,
    MIN_PREFIX,
    AnswerCollator,
    add_blank_row,
    answer_collator,
    answer_loss,
    encode_rows,
)
from deal_core.data.schema import TaskSchema
from deal_core.errors import ConfigError
from deal_core.training import kernels, trainer
from deal_core.training.kernels import compiled_layers, set_attention
from tests.unit.deal_core.conftest import TASK, TONE, Train, assert_close_weights, at_night, pairs

STEPS = TrainConfig(max_steps=4, batch_size=4, learning_rate=5e-3, max_prompt_tokens=64, checkpoint_steps=2)
NEXT = replace(TASK, name="tones", instruction="Which tone is meant?")
"""Learned after TASK, whose instruction the parent then answers."""


@pytest.fixture(params=["deal", *at_night("seq_lora")])
def strategy(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def require_same(train: Train, strategy: str, parent: Path, **change: Any) -> None:
    """Train a later task with and without a change, and compare."""
    given = {"task": NEXT, "old_tasks": (TASK,)}
    plain, changed = (train(strategy, parent, train=replace(STEPS, **each), **given) for each in ({}, change))
    assert changed.losses == pytest.approx(plain.losses, rel=1e-4)
    assert_close_weights(plain.folder, changed.folder, atol=2e-4, rtol=1e-3)


def test_padding_free_batches_train_as_padded_ones(strategy: str, train: Train, parent: Path) -> None:
    require_same(train, strategy, parent, padding_free=True)


@pytest.mark.parametrize("way", ["is_padding_free", "shares_prefix"])
def test_each_form_of_a_batch_gives_the_losses_and_gradients_of_padded_whole_rows(
    way: str, base: BaseModel, task: TaskSchema, rows: Callable[..., Dataset]
) -> None:
    model = attach_adapter(base.model, AdapterConfig(rank=4), seed=0)
    encoded = encode_rows(rows(5), base.tokenizer, task, max_prompt_tokens=64, max_answer_tokens=8)
    if way == "is_padding_free":
        encoded = add_blank_row(encoded)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape) if "lora_B" in name else 0)
    found = []
    for is_so in (False, True):
        batch = AnswerCollator(base.tokenizer, is_seq2seq=False, **{way: is_so})(list(encoded))
        assert ("prefix_ids" in batch) == (is_so and way == "shares_prefix")
        model.zero_grad()
        loss = answer_loss(model, batch)
        loss.backward()
        found.append((loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)
    if way == "is_padding_free":
        num_tokens = sum(len(row["prompt_ids"]) + len(row["answer_ids"]) for row in encoded)
        assert batch["input_ids"].shape == (1, num_tokens), "no place is padding"
    else:
        assert batch["prefix_ids"].shape[1] >= MIN_PREFIX and len(set(batch["attention_mask"].sum(1).tolist())) > 1
    model.unload()


def test_a_model_that_is_not_known_to_read_rows_without_padding_is_refused(base: BaseModel) -> None:
    base.model.config.model_type = "mpt"
    with pytest.raises(ConfigError, match="padding_free is not known to work with a base model of type 'mpt'"):
        answer_collator(base.model, base.tokenizer, reads_whole_rows=True, padding_free=True)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_each_attention_trains_the_same_and_leaves_the_model_as_it_was(
    attention: str, strategy: str, base: BaseModel, train: Train, parent: Path
) -> None:
    usual = base.model.config._attn_implementation
    require_same(train, strategy, parent, attention=attention)
    seen = set()
    train(train=replace(STEPS, attention=attention), on_log=lambda *_: seen.add(base.model.config._attn_implementation))
    assert seen == {attention} != {usual}
    assert base.model.config._attn_implementation == usual


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_an_attention_that_model_machine_or_precision_does_not_have_is_refused(
    base: BaseModel, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"flash_attention_2, which needs a CUDA device"):
        train(train=replace(STEPS, attention="flash_attention_2"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match=r"which has no fp32"):
        set_attention(base.model, "flash_attention_2")
    base.model.to(torch.bfloat16)
    with pytest.raises(ConfigError, match=r"train.attention is flash_attention_2: .*FlashAttention2"):
        set_attention(base.model, "flash_attention_2")  # its package is not installed
    monkeypatch.setattr(type(base.model), "_can_set_attn_implementation", lambda *_: False)
    with pytest.raises(ConfigError, match="a base model of type 'llama' has one kind alone"):
        set_attention(base.model, "eager")


@pytest.mark.nightly
def test_compiled_layers_train_the_same_compile_once_and_are_gone_afterwards(
    strategy: str, base: BaseModel, train: Train, parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.compiler.reset()
    counter = CompileCounter()
    monkeypatch.setattr(kernels, "BACKEND", counter)
    numbers: list[int] = []
    require_same(train, strategy, parent, torch_compile=True)
    after = counter.frame_count
    assert after > 0
    train(
        strategy,
        parent,
        train=replace(STEPS, torch_compile=True, max_steps=8),
        on_log=lambda *_: numbers.append(counter.frame_count),
    )
    assert numbers[-1] == numbers[3], "rows of another length compile nothing"
    assert all(module._compiled_call_impl is None for module in base.model.modules())


def test_layers_that_are_recomputed_or_unknown_are_not_compiled() -> None:
    with pytest.raises(ConfigError, match=r"compiles nothing of a layer that train.gradient_checkpointing recomputes"):
        TrainConfig(torch_compile=True, gradient_checkpointing=True)
    with pytest.raises(ConfigError, match="does not know the layers of Linear"), compiled_layers(nn.Linear(1, 1)):
        pytest.fail("nothing was compiled")


@pytest.mark.parametrize(
    "change",
    [
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "batch_size": 2, "gradient_accumulation_steps": 2},
        {"padding_free": True},
    ],
    ids=str,
)
def test_an_accelerator_reads_rehearsed_rows_with_the_new_ones_and_learns_the_same(
    change: dict[str, Any], strategy: str, base: BaseModel, train: Train, parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"train": replace(STEPS, **change), "task": NEXT, "old_tasks": (TASK,)}
    passes = 0

    def count(_: Any, inputs: Any) -> None:
        nonlocal passes
        passes += base.model.training

    with base.model.model.register_forward_pre_hook(count):
        apart = train(strategy, parent, **given)
        num_apart, passes = passes, 0
        monkeypatch.setattr(trainer, "APART_ON", ())
        together = train(strategy, parent, **given)
    is_rehearsed = any("rehearsed" in note for note in apart.result.notes)
    assert num_apart - passes == is_rehearsed * STEPS.max_steps and passes == len(apart.losses) * (
        change.get("gradient_accumulation_steps", 1)
    )
    assert together.losses == pytest.approx(apart.losses, rel=1e-4)
    assert_close_weights(apart.folder, together.folder, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder", "without padding"])
def test_joined_batches_are_the_batch_of_all_rows(kind: str, base: BaseModel) -> None:
    collate = AnswerCollator(
        base.tokenizer, is_seq2seq=kind == "encoder-decoder", is_padding_free=kind == "without padding"
    )
    short = [{"prompt_ids": [5, 6], "answer_ids": [7]}, {"prompt_ids": [5], "answer_ids": []}]
    long = [{"prompt_ids": [8, 9, 10, 11], "answer_ids": [12, 13, 14]}]
    for one, other in ((short, long), (long, short)):
        joined, whole = collate.joined(collate(one), collate(other)), collate([*one, *other])
        assert joined.keys() == whole.keys()
        for batch in (joined, whole):
            if ANSWER_POSITIONS in batch:  # where there is no answer, the place is of no token
                batch[ANSWER_POSITIONS] = batch[ANSWER_POSITIONS].where(batch["labels"] != IGNORED, 0)
        assert all(torch.equal(joined[name], whole[name]) for name in whole)


def test_preferences_with_rehearsed_rows_are_learned_the_same_in_one_pass(
    train: Train, parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = replace(STEPS, gradient_checkpointing=True, preference_learning_rate=5e-3)
    given = {"rows": pairs(8), "train": steps, "task": TONE, "old_tasks": (TASK,)}
    apart = train("deal", parent, **given)
    assert any("rehearsed" in note for note in apart.result.notes)
    monkeypatch.setattr(trainer, "APART_ON", ())
    assert train("deal", parent, **given).losses == pytest.approx(apart.losses, rel=1e-4)


def test_an_accelerator_reads_a_long_prefix_once_and_learns_the_same(
    base: BaseModel, train: Train, parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rehearsed rows, whose instruction is short, are then read apart. A short prefix is read with each row."""
    long = replace(NEXT, instruction="Which tone is meant? " * 30)
    lengths: list[int] = []

    def note(_: Any, args: Any, options: dict[str, Any]) -> None:
        if base.model.training:
            lengths.append(options["input_ids"].shape[1])

    def learned(task: TaskSchema, **change: Any) -> tuple[list[float], list[int]]:
        lengths.clear()
        steps = replace(STEPS, max_prompt_tokens=400, **change)
        return train("deal", parent, task=task, old_tasks=(TASK,), train=steps).losses, list(lengths)

    whole, _ = learned(long, gradient_checkpointing=True)
    monkeypatch.setattr(collate, "MIN_PREFIX_ON", {})
    monkeypatch.setattr(trainer, "APART_ON", ())
    with base.model.model.register_forward_pre_hook(note, with_kwargs=True):
        found, passes = learned(long)
        _, short = learned(NEXT)
    assert found == pytest.approx(whole, rel=1e-4)
    assert sum(length >= collate.LONG_PREFIX for length in passes) == STEPS.max_steps and len(passes) == 3 * len(found)
    assert len(short) == STEPS.max_steps, "one pass for all rows of a step"
