"""Train one adapter on one task, with any strategy. Training can resume at every checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from datasets import Dataset, concatenate_datasets
from peft import PeftModel
from transformers import TrainingArguments

from deal_core.adapter.state import adapter_fill, attach_adapter, load_adapter, load_method_state, save_adapter
from deal_core.base_model.load import BaseModel
from deal_core.config import AdapterConfig, TrainConfig
from deal_core.data.collate import encode_rows
from deal_core.data.schema import TaskSchema
from deal_core.errors import ConfigError, DataValidationError
from deal_core.method_config import MethodConfig
from deal_core.strategies import make_strategy, strategy_class
from deal_core.strategies.strategy import MethodState, Strategy, TaskContext, TaskTexts
from deal_core.training.objective import (
    AnswerLoss,
    Objective,
    PairCollator,
    PreferenceLoss,
    add_reference,
    add_rejected,
    describe_preferences,
)
from deal_core.training.trainer import (
    AdapterTrainer,
    OnLog,
    WatchSteps,
    find_checkpoint,
    training_arguments,
)

MIN_REPEATS = 4
"""Rows of an answer, on average, from which on the answers of a task without labels count as labels."""


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """Result of a training run.

    Attributes:
        num_steps: Optimiser steps of the whole run, including those before a resume.
        seconds: Wall time of this call's training loop.
        rows_per_second: Training rows per second in this call.
        losses: (step, mean loss per token that counts) of every step, including those before a resume.
        resumed_from_step: Step of the checkpoint that the run continued from, or None.
        fill: Share of each module's slots that the trained adapter uses.
        notes: Remarks for people about how the task was learned.
    """

    num_steps: int
    seconds: float
    rows_per_second: float
    losses: tuple[tuple[int, float], ...]
    resumed_from_step: int | None
    fill: Mapping[str, float]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class TrainingSetup:
    """The task, the strategy and all settings of one training.

    Attributes:
        task: How a row becomes a prompt.
        old_tasks: The tasks that the parent has learned, in order: instructions and labels, never rows.
        strategy: Name of the strategy.
        adapter: Shape of a new adapter; a parent's adapter keeps its own shape.
        method: Settings of the strategies; each strategy reads its own part. `selection` is not read here: a caller
            chooses rows first, see `deal_core.selection.choose`.
        train: Steps, batches and learning rate.
    """

    task: TaskSchema
    old_tasks: tuple[TaskSchema, ...] = ()
    strategy: str
    adapter: AdapterConfig
    method: MethodConfig
    train: TrainConfig


@dataclass(frozen=True, kw_only=True)
class OtherRows:
    """Rows besides those of the new task.

    Attributes:
        joined: Further tasks with their rows, learned in the same run; for joint training.
        old_texts: Texts of old tasks that may be asked about, for `rehearsal.texts: own`.
    """

    joined: Sequence[tuple[TaskSchema, Dataset]] = ()
    old_texts: Sequence[TaskTexts] = ()


def train_adapter(
    base: BaseModel,
    rows: Dataset,
    setup: TrainingSetup,
    *,
    parent_folder: Path | None,
    output_folder: Path,
    checkpoint_folder: Path,
    others: OtherRows = OtherRows(),
    on_log: OnLog | None = None,
) -> TrainingResult:
    """Continue the parent's adapter (or start one) on the rows of a task, and save the result.

    A second call with the same arguments continues from the last complete checkpoint of a call that died.

    Args:
        base: The base model. It has no adapter again after the call.
        rows: Training rows with columns input and output, and rejected if the task learns preferences.
        setup: The task, the strategy and their settings.
        parent_folder: Folder of the parent version's adapter; None for the first task of a lineage.
        output_folder: Folder for the PEFT files and the method's state.
        checkpoint_folder: Folder for the checkpoints.
        others: Rows besides those of the new task.
        on_log: Called after every optimiser step with the step and its loss and gradient norm. After a resume it is
            first called for the earlier steps.

    Raises:
        DataValidationError: There is no row to train on.
        ConfigError: This is not one of `train.num_processes` processes; `deal_core.training.ranks` starts them. Or
            a task of several learns preferences.
        AdapterStateError: The parent's adapter does not fit the base.
    """
    task, strategy, train = setup.task, setup.strategy, setup.train
    if task.learns_preferences:
        train = replace(train, learning_rate=train.preference_learning_rate)
    if len(rows) == 0:
        raise DataValidationError(f"Task {task.name!r} has no training rows; land at least one batch of them.")
    num_rows = len(rows) + sum(len(each_rows) for _, each_rows in others.joined)
    args = training_arguments(train, checkpoint_folder, num_rows)
    if args.world_size != train.num_processes:
        raise ConfigError(
            f"train.num_processes is {train.num_processes}, but here {args.world_size} train; an adaptation starts its "
            "processes itself, and any other training uses one process."
        )
    if not base.is_quantized:  # a quantized model is on its device already and cannot be moved
        base.model.to(args.device)  # first, because the strategy creates its tensors on the factors' device
    parent_state = None if parent_folder is None else load_method_state(parent_folder)
    inherited = parent_state
    if parent_state is not None and parent_state.strategy != strategy:
        inherited = replace(parent_state, tensors=parent_state.stored_rows)  # other tensors are the old strategy's own
    model = _with_adapter(base, setup, parent_folder)
    try:
        encoded = _encode(base, setup, [(task, rows), *others.joined])
        if task.learns_preferences:  # the model is the parent version until the strategy prepares it
            encoded = add_reference(encoded, rows, model, base.tokenizer, task, train)
        context = TaskContext(
            base=base,
            task=task,
            rows=rows,
            encoded=encoded,
            old_tasks=setup.old_tasks,
            old_texts=tuple(others.old_texts),
            adapter=setup.adapter,
            train=train,
        )
        learner = make_strategy(strategy, setup.method, train.seed)
        learner.prepare(model, inherited, context)
        trainer = _make_trainer(model, args, learner, setup, context)
        trainer.add_callback(WatchSteps(on_log, checkpoint_folder))
        with trainer.accelerator.main_process_first():  # it removes incomplete checkpoints
            checkpoint = find_checkpoint(checkpoint_folder)
        started = time.perf_counter()
        trainer.run(checkpoint)
        seconds = time.perf_counter() - started
        state = replace(learner.finish(), num_arrivals=learner.num_arrivals + 1)
        if args.process_index == 0:
            save_adapter(model, output_folder, state, base_name=base.name)
        notes = (
            *learner.notes(),
            *_lost(parent_state, state),
            *_cut(encoded, train),
            *([describe_preferences(encoded)] if task.learns_preferences else []),
        )
        return _summarise(trainer, num_rows, seconds, checkpoint, adapter_fill(model), notes)
    finally:
        model.unload()
        if train.gradient_checkpointing:
            base.model.gradient_checkpointing_disable()


def _with_adapter(base: BaseModel, setup: TrainingSetup, parent_folder: Path | None) -> PeftModel:
    if parent_folder is None:
        return attach_adapter(base.model, setup.adapter, seed=setup.train.seed)
    num_new_slots = strategy_class(setup.strategy).num_new_slots(setup.adapter)
    return load_adapter(base.model, parent_folder, is_trainable=True, num_new_slots=num_new_slots)


def _make_trainer(
    model: PeftModel, args: TrainingArguments, learner: Strategy, setup: TrainingSetup, context: TaskContext
) -> AdapterTrainer:
    train, task = context.train, context.task
    collate = context.collator()
    return AdapterTrainer(
        model=model,
        args=args,
        train_dataset=context.encoded,
        data_collator=PairCollator(collate) if task.learns_preferences else collate,
        strategy=learner,
        objective=_objective(setup),
        balance_labels=train.balance_labels and _are_labels(task, context.encoded),
    )


def _encode(base: BaseModel, setup: TrainingSetup, tasks: Sequence[tuple[TaskSchema, Dataset]]) -> Dataset:
    """Tokenise the rows of all tasks."""
    train = setup.train
    _require_no_preferences(tasks)
    parts = [
        encode_rows(
            rows,
            base.tokenizer,
            task,
            max_prompt_tokens=train.max_prompt_tokens,
            max_answer_tokens=train.max_answer_tokens,
        )
        for task, rows in tasks
    ]
    if setup.task.learns_preferences:
        parts = [
            add_rejected(part, rows, base.tokenizer, task, train.max_answer_tokens)
            for part, (task, rows) in zip(parts, tasks, strict=True)
        ]
    return concatenate_datasets(parts)


def _require_no_preferences(tasks: Sequence[tuple[TaskSchema, Dataset]]) -> None:
    """Refuse to learn preferences together with other tasks."""
    if len(tasks) > 1 and any(task.learns_preferences for task, _ in tasks):
        raise ConfigError("Preferences are learned alone, and joint training has several tasks; leave them out there.")


def _are_labels(task: TaskSchema, encoded: Dataset) -> bool:
    """Whether answers repeat as labels do. Spread evenly, answers of their own would mix long rows with short ones."""
    return bool(task.labels) or MIN_REPEATS * len(set(map(tuple, encoded["answer_ids"]))) <= len(encoded)


def _objective(setup: TrainingSetup) -> Objective:
    """The loss of the task's rows."""
    if setup.task.learns_preferences:
        return PreferenceLoss(setup.train.preference_beta)
    return AnswerLoss()


def _lost(parent: MethodState | None, state: MethodState) -> Iterator[str]:
    """Notes about kept data of the parent that a change of strategy or settings dropped."""
    if parent is None:
        return
    if parent.stored_rows and not state.stored_rows:
        yield (
            f"the rows kept of {len(parent.stored_rows)} earlier arrivals are gone: {state.strategy} with these "
            "settings keeps no rows"
        )
    if parent.strategy != state.strategy and parent.tensors.keys() - parent.stored_rows.keys():
        yield f"the data that {parent.strategy} kept with the parent's adapter is gone: {state.strategy} cannot use it"


def _cut(encoded: Dataset, train: TrainConfig) -> Iterator[str]:
    """Notes about cut rows. An answer of exactly the maximal length counts as cut."""
    if num_prompts := sum(encoded["is_prompt_cut"]):
        yield (
            f"{num_prompts} of {len(encoded)} training prompts are longer than train.max_prompt_tokens "
            f"({train.max_prompt_tokens}): the end of their text, or a chat's oldest turns, was left out"
        )
    num_answers = sum(len(answer_ids) == train.max_answer_tokens for answer_ids in encoded["answer_ids"])
    if num_answers:
        yield (
            f"{num_answers} of {len(encoded)} training answers fill train.max_answer_tokens "
            f"({train.max_answer_tokens}): longer answers were cut"
        )


def _rows_until(step: int, num_rows: int, rows_per_step: int) -> int:
    """Rows that the first `step` optimiser steps have seen; the last step of an epoch may have fewer rows."""
    epochs, steps = divmod(step, math.ceil(num_rows / rows_per_step))
    return epochs * num_rows + steps * rows_per_step


def _summarise(
    trainer: AdapterTrainer,
    num_rows: int,
    seconds: float,
    checkpoint: Path | None,
    fill: Mapping[str, float],
    notes: tuple[str, ...],
) -> TrainingResult:
    state, args = trainer.state, trainer.args
    resumed_from = None if checkpoint is None else int(checkpoint.name.rsplit("-", 1)[1])
    rows_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    seen, before = (_rows_until(step, num_rows, rows_per_step) for step in (state.global_step, resumed_from or 0))
    return TrainingResult(
        num_steps=state.global_step,
        seconds=seconds,
        rows_per_second=(seen - before) / seconds if seconds > 0 else 0.0,
        losses=tuple((int(log["step"]), float(log["loss"])) for log in state.log_history if "loss" in log),
        resumed_from_step=resumed_from,
        fill=fill,
        notes=notes,
    )
