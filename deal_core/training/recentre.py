"""Train a version until it prefers none of its tasks' labels: it learns its own answers, re-centred.

The adapter learns the offsets of `deal_core.strategies.label_questions` in a few steps after the training. So a plain
PEFT folder answers re-centred.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from peft import PeftModel

from deal_core.adapter.state import load_adapter, load_method_state, save_adapter
from deal_core.base_model.load import BaseModel
from deal_core.config import TrainConfig
from deal_core.data.collate import answer_collator
from deal_core.strategies.label_questions import recentred_questions
from deal_core.strategies.rehearsal import Question, Rehearsal
from deal_core.strategies.strategy import TaskTexts

OnStage = Callable[[int, int, str], None]


def recentre_adapter(
    base: BaseModel,
    folder: Path,
    tasks: Sequence[TaskTexts],
    train: TrainConfig,
    on_stage: OnStage = lambda done, total, stage: None,
) -> tuple[str, ...]:
    """Train a saved adapter for `train.recentre_steps` on its own re-centred answers, and save it in its place.

    The tasks take turns, so each has an equal share of the steps. The rate falls linearly from `train.learning_rate`.

    Args:
        base: The base model. It has no adapter again after the call.
        folder: The adapter. Its method state stays as it is.
        tasks: Texts of all tasks of the version; tasks without labels or texts are left out.
        train: Number of steps, rows per step, rate and seed.
        on_stage: Called with the number of finished steps or texts, their total, and what is done.

    Returns:
        Notes for people; empty if there is nothing to do.

    Raises:
        AdapterStateError: The adapter does not fit the base.
        TrainingDivergedError: The adapter's scores are not finite.
    """
    tasks = [each for each in tasks if each.task.labels and len(each.rows)]
    if not (train.recentre_steps and tasks):
        return ()
    model = load_adapter(base.model, folder, is_trainable=True)
    try:
        sets, shifts = _questions(base, model, tasks, train, on_stage)
        collate = answer_collator(base.model, base.tokenizer, is_recomputed=train.gradient_checkpointing)
        rehearsal = Rehearsal([sets], collate, num_rows=train.batch_size, weight=1.0, temperature=1.0, seed=train.seed)
        if train.gradient_checkpointing:
            base.model.gradient_checkpointing_enable({"use_reentrant": False})
        _learn(model, rehearsal, train, on_stage)
        save_adapter(model, folder, load_method_state(folder), base_name=base.name)
    finally:
        model.unload()
        if train.gradient_checkpointing:
            base.model.gradient_checkpointing_disable()
    worst = max(range(len(tasks)), key=shifts.__getitem__)
    return (
        f"re-centred the labels of {len(tasks)} tasks in {train.recentre_steps} steps; before, "
        f"{shifts[worst]:.0%} of the answers to {tasks[worst].task.name} had a label that others should have had",
    )


def _questions(
    base: BaseModel, model: PeftModel, tasks: Sequence[TaskTexts], train: TrainConfig, on_stage: OnStage
) -> tuple[list[list[Question]], list[float]]:
    """For each task, the questions, and how far the labels' shares in the answers were from their true shares."""
    generator, total, done = random.Random(train.seed), sum(len(each.rows) for each in tasks), 0
    sets, shifts = [], []
    for each in tasks:
        on_stage(done, total, f"finding the label offsets of {each.task.name}")
        questions, shift = recentred_questions(model, base.tokenizer, each, generator)
        sets.append(questions)
        shifts.append(shift)
        done += len(each.rows)
    return sets, shifts


def _learn(model: PeftModel, rehearsal: Rehearsal, train: TrainConfig, on_stage: OnStage) -> None:
    """Take the steps with AdamW."""
    factors = [factor for factor in model.parameters() if factor.requires_grad]
    optimizer = torch.optim.AdamW(factors, lr=train.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, train.recentre_steps)
    model.train()
    for step in range(train.recentre_steps):
        on_stage(step, train.recentre_steps, "re-centring the labels")
        loss = rehearsal.loss(model, step)
        assert loss is not None, "there are questions"
        loss.backward()  # type: ignore[no-untyped-call]
        if train.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(factors, train.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
