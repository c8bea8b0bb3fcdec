"""Replay: a share of each task's rows is kept, asked about with every later task, and handed to another strategy."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from deal_core.adapter.state import load_method_state
from deal_core.config import TrainConfig
from deal_core.method_config import RehearsalConfig
from deal_core.strategies.rehearsal import unpack

LONG = TrainConfig(max_steps=12, batch_size=4, learning_rate=1e-2, max_prompt_tokens=64, checkpoint_steps=0)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def distance(first: Path, second: Path) -> float:
    one, other = weights(first), weights(second)
    return sum(float((one[name] - other[name]).square().sum()) for name in one) ** 0.5


def test_first_task_is_plain_lora(train):
    ours, plain = (weights(train(strategy, train=LONG).folder) for strategy in ("replay", "seq_lora"))
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


def test_every_later_task_is_learned(train):
    first = train("replay", train=LONG).folder
    quick = TrainConfig(max_steps=30, batch_size=8, learning_rate=2e-2, checkpoint_steps=0)
    losses = train("replay", first, train=quick).losses
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_replay_keeps_its_share_of_every_tasks_rows(train):
    config = RehearsalConfig(stored_share=0.25)
    first = train("replay", rehearsal=config).folder
    second = train("replay", first, rehearsal=config).folder
    state = load_method_state(second)
    assert state.stores == "data"
    assert [len(unpack(value)) for _, value in sorted(state.tensors.items())] == [6, 6]


def test_replay_asks_the_stored_rows(train):
    """With a very large weight of the stored rows, the later task changes the adapter in another way."""
    first = train("replay", rehearsal=RehearsalConfig(stored_share=0.25)).folder
    light, heavy = (
        train("replay", first, train=LONG, rehearsal=RehearsalConfig(stored_share=0.25, weight=weight)).folder
        for weight in (1e-6, 10.0)
    )
    plain = train("seq_lora", first, train=LONG).folder
    assert distance(light, plain) < 1e-2 < distance(heavy, plain)


def test_stored_rows_pass_from_one_strategy_that_keeps_them_to_another(train):
    stored = RehearsalConfig(texts="stored", stored_share=0.25)
    first = train("replay", rehearsal=stored).folder
    second = train("deal", first, rehearsal=stored)
    assert len(load_method_state(second.folder).stored_rows) == 2
    assert not any("gone" in note for note in second.result.notes)
