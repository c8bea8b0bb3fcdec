"""Train a version until it prefers none of its tasks' labels: it learns its own answers, re-centred.

The adapter learns the offsets of `deal_core.evaluation.label_scores` in a few steps after the training. So a plain
PEFT folder answers re-centred.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn

from benchmarks.method.asked import TaskTexts, labelled_texts
from deal_core.adapter.state import load_adapter, load_method_state, save_adapter
from deal_core.base_model.load import BaseModel
from deal_core.config import TrainConfig
from deal_core.data.collate import answer_collator
from deal_core.strategies.rehearsal import Rehearsal

OnStage = Callable[[int, int, str], None]


def recentre_adapter(
    base: BaseModel,
    folder: Path,
    tasks: Sequence[TaskTexts],
    train: TrainConfig,
    num_steps: int,
    on_stage: OnStage = lambda done, total, stage: None,
) -> tuple[str, ...]:
    """Train a saved adapter for `num_steps` steps on its own re-centred answers, and save it in its place.

    The tasks take turns, so each has an equal share of the steps. The rate falls linearly from `train.learning_rate`.

    Args:
        base: The base model. It has no adapter again after the call.
        folder: The adapter. Its method state stays as it is.
        tasks: Texts of all tasks of the version; tasks without labels or texts are left out.
        train: Rows per step, rate and seed.
        num_steps: Number of steps.
        on_stage: Called with the number of finished steps or texts, their total, and what is done.

    Returns:
        Notes for people; empty if there is nothing to do.

    Raises:
        AdapterStateError: The adapter does not fit the base.
        TrainingDivergedError: The adapter's scores are not finite.
    """
    tasks = [texts for texts in tasks if texts.task.labels and len(texts.rows)]
    if not (num_steps and tasks):
        return ()
    model = load_adapter(base.model, folder, is_trainable=True)
    try:
        generator, total, done = random.Random(train.seed), sum(len(texts.rows) for texts in tasks), 0
        sets = []
        for texts in tasks:
            on_stage(done, total, f"finding the label offsets of {texts.task.name}")
            sets.append(labelled_texts(model, base.tokenizer, texts, generator))
            done += len(texts.rows)
        collate = answer_collator(base.model, base.tokenizer, reads_whole_rows=train.gradient_checkpointing)
        rehearsal = Rehearsal(sets, collate, num_rows=train.batch_size, seed=train.seed)
        if train.gradient_checkpointing:
            base.model.gradient_checkpointing_enable({"use_reentrant": False})
        factors = [factor for factor in model.parameters() if factor.requires_grad]
        learn_rehearsal(
            model,
            factors,
            rehearsal,
            train,
            num_steps,
            lambda step: on_stage(step, num_steps, "re-centring the labels"),
        )
        save_adapter(model, folder, load_method_state(folder), base_name=base.name)
    finally:
        model.unload()
        if train.gradient_checkpointing:
            base.model.gradient_checkpointing_disable()
    return (f"re-centred the labels of {len(tasks)} tasks in {num_steps} steps",)


def learn_rehearsal(
    model: PeftModel,
    factors: Sequence[nn.Parameter],
    rehearsal: Rehearsal,
    train: TrainConfig,
    num_steps: int,
    on_step: Callable[[int], None] = lambda step: None,
) -> None:
    """Take steps with AdamW on rehearsed rows alone. The rate falls linearly from `train.learning_rate` to 0.

    Args:
        model: The model with its adapter on.
        factors: The parameters that are trained.
        rehearsal: Gives the rows of every step.
        train: The rate at first, and the limit of the gradient's norm.
        num_steps: Number of steps.
        on_step: Called before every step with its number, from 0.
    """
    optimizer = torch.optim.AdamW(factors, lr=train.rate(model.num_parameters()), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, num_steps)
    model.train()
    model.zero_grad()
    for step in range(num_steps):
        on_step(step)
        loss = rehearsal.loss(model, step)
        assert loss is not None, "there are questions"
        loss.backward()  # type: ignore[no-untyped-call]
        if train.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(factors, train.max_grad_norm)
        optimizer.step()
        schedule.step()
        model.zero_grad()
