"""A training calls a strategy in the order that the head of `deal_core.strategies.strategy` states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset

from deal_core.config import TrainConfig
from deal_core.data.schema import TaskSchema
from deal_core.strategies.rehearsal import Rehearsal
from deal_core.strategies.replay import Replay
from deal_core.training.trainer import AdapterTrainer

TWO_STEPS = TrainConfig(
    max_steps=2, batch_size=4, gradient_accumulation_steps=2, max_prompt_tokens=64, checkpoint_steps=1
)
OTHER = TaskSchema(name="other", labels=("large", "small"), instruction="How big is it?")
HOOKS = {
    "prepare": (Replay, "prepare"),
    "new rows": (AdapterTrainer, "compute_loss"),
    "old rows": (Rehearsal, "loss"),
    "before_step": (Replay, "before_step"),
    "penalty": (Replay, "penalty"),
    "clip": (AdapterTrainer, "_clip_grad_norm"),
    "AdamW": (torch.optim.AdamW, "step"),
    "after_step": (Replay, "after_step"),
    "checkpoint": (Replay, "checkpoint"),
    "finish": (Replay, "finish"),
}


def test_the_order_of_a_step_is_the_stated_one(task, train, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = train("replay", train=TWO_STEPS).folder
    calls: list[str] = []
    for name, (owner, attribute) in HOOKS.items():
        called = getattr(owner, attribute)

        def record(*given: Any, name: str = name, called: Any = called, **named: Any) -> Any:
            calls.append(name)
            return called(*given, **named)

        monkeypatch.setattr(owner, attribute, record)
    rows = Dataset.from_list([{"input": f"number {i}", "output": OTHER.labels[i % 2]} for i in range(16)])
    train("replay", parent, old_tasks=(task,), task=OTHER, rows=rows, train=TWO_STEPS)
    step = ["new rows", "new rows", "old rows", "before_step", "penalty", "clip", "AdamW", "after_step"]
    assert calls == ["prepare", *step, "checkpoint", *step, "finish"]
