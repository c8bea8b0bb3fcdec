"""Train one adapter on one task, with any strategy. Training can resume at every checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from datasets import Dataset, concatenate_datasets

from deal_core.adapter.files import MethodState
from deal_core.adapter.precision import FP32_ON, base_precision
from deal_core.adapter.state import adapter_fill, attach_adapter, load_adapter, load_method_state, save_adapter
from deal_core.base_model.language_model import device_of
from deal_core.base_model.load import BaseModel
from deal_core.base_model.sharding import shard_base
from deal_core.config import MIN_VALIDATED, AdapterConfig, Shard, TrainConfig
from deal_core.data.collate import encode_rows
from deal_core.data.schema import TaskSchema
from deal_core.errors import ConfigError, DataValidationError
from deal_core.method_config import MethodConfig
from deal_core.strategies import make_strategy, strategy_class
from deal_core.strategies.rehearsal import RehearsedRow
from deal_core.strategies.strategy import TaskContext
from deal_core.training.kernels import compiled_layers, set_attention
from deal_core.training.objective import (
    AnswerLoss,
    PairCollator,
    PreferenceLoss,
    add_preferences,
    describe_preferences,
)
from deal_core.training.trainer import AdapterTrainer, OnCheckpoint, OnLog, find_checkpoint, training_arguments
from deal_core.training.validation import Validation

MIN_REPEATS = 4
"""Rows of an answer, on average, from which on the answers of a task without labels count as labels."""


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """Result of a training run."""

    num_steps: int
    """Optimiser steps of the whole run, including those before a resume."""
    seconds: float
    """Wall time of this call's training loop."""
    rows_per_second: float
    """Training rows per second in this call."""
    losses: tuple[tuple[int, float], ...]
    """(step, mean loss per token that counts) of every step, including those before a resume."""
    validation_losses: tuple[tuple[int, float], ...]
    """(step, mean loss per token that counts) of the rows that were held back; empty: there were none."""
    kept_step: int | None
    """The step whose adapter is the result; None: the last one, as no rows were held back."""
    resumed_from_step: int | None
    """Step of the checkpoint that the run continued from, or None."""
    fill: Mapping[str, float]
    """Share of each module's slots that the trained adapter uses."""
    notes: tuple[str, ...]
    """Remarks for people about how the task was learned."""


@dataclass(frozen=True, kw_only=True)
class TrainingSetup:
    """The task, the strategy and all settings of one training."""

    task: TaskSchema
    """How a row becomes a prompt."""
    old_tasks: tuple[TaskSchema, ...] = ()
    """The tasks that the parent has learned, in order: instructions and labels, never rows."""
    strategy: str
    adapter: AdapterConfig
    """Shape of a new adapter; a parent's adapter keeps its own shape."""
    method: MethodConfig
    """Settings of the strategies; each strategy reads its own part. `selection` is not read here: a caller chooses rows
    first, see `deal_core.selection.choose`."""
    train: TrainConfig


@dataclass(frozen=True, kw_only=True)
class KeptSource:
    """A version whose kept rows a joint training hands on, and learns for tasks that lack rows of their own."""

    folder: Path
    """Folder of the version's adapter."""
    learned: tuple[TaskSchema, ...] = ()
    """Tasks whose kept rows are learned too. A row that is among the training rows is learned once."""


def train_adapter(
    base: BaseModel,
    rows: Dataset,
    setup: TrainingSetup,
    *,
    parent_folder: Path | None,
    output_folder: Path,
    checkpoint_folder: Path,
    joined: Sequence[tuple[TaskSchema, Dataset]] = (),
    kept: KeptSource | None = None,
    shard: Shard = "none",
    on_log: OnLog | None = None,
    on_checkpoint: OnCheckpoint | None = None,
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
        joined: Further tasks with their rows, learned in the same run; for joint training.
        kept: Kept rows that the result hands on to later versions; for joint training.
        shard: base: each process keeps a part of the frozen base model; the model stays sharded after the call.
        on_log: Called after every optimiser step with the step and its loss and gradient norm. After a resume it is
            first called for the earlier steps.
        on_checkpoint: Called by every process after a checkpoint, with the checkpoint's folder.

    Raises:
        DataValidationError: There is no row to train on.
        ConfigError: This is not one of `train.num_processes` processes; `deal_core.training.main` is one. Or
            a task of several learns preferences.
        AdapterStateError: The parent's adapter does not fit the base.
        DeviceMemoryError: A step does not fit into the device's memory; see `train_within_memory` of the jobs.
    """
    task, train, tasks = setup.task, setup.train, [(setup.task, rows), *joined]
    handed_on, more_rows = _kept_rows(kept)
    if len(rows) == 0 and not more_rows:
        raise DataValidationError(f"Task {task.name!r} has no training rows; land at least one batch of them.")
    if joined and any(schema.learns_preferences for schema, _ in tasks):
        raise ConfigError("Preferences are learned alone, and joint training has several tasks; leave them out there.")
    encoded = _encode(tasks, more_rows, base, train)
    num_rows = train.num_learned(len(encoded))
    rate = train.preference_learning_rate if task.learns_preferences else train.rate(base.model.num_parameters())
    args = training_arguments(train, checkpoint_folder, num_rows, rate)
    if args.world_size != train.num_processes:
        raise ConfigError(
            f"train.num_processes is {train.num_processes}, but here {args.world_size} train; an adaptation starts its "
            "processes itself, and any other training uses one process."
        )
    if not base.is_quantized and shard == "none":  # a quantized model is on its device already and cannot be moved
        base.model.to(args.device)  # first, because the strategy creates its tensors on the factors' device

    usual_attention = base.model.config._attn_implementation
    parent_state: MethodState | None = None
    inherited: MethodState | None = None
    if parent_folder is None:
        model = attach_adapter(base.model, setup.adapter, seed=train.seed)
    else:
        parent_state = inherited = load_method_state(parent_folder)
        if parent_state.strategy != setup.strategy:  # its other tensors are of no use to this strategy
            inherited = replace(parent_state, tensors=parent_state.kept_rows)
        num_new_slots = strategy_class(setup.strategy).num_new_slots(setup.adapter)
        model = load_adapter(base.model, parent_folder, is_trainable=True, num_new_slots=num_new_slots)
    try:
        set_attention(base.model, train.attention)
        if shard == "base":
            shard_base(model)
        if task.learns_preferences:  # the model is the parent version until the strategy prepares it
            encoded = add_preferences(encoded, rows, model, base.tokenizer, task, train)
        validation = None
        if num_rows < len(encoded):
            learned, held_back = _divide(encoded, num_rows, train.seed)
            validation = Validation(
                encoded.select(held_back),
                num_steps=args.max_steps,
                steps_of_epoch=math.ceil(num_rows / (train.batch_size * train.gradient_accumulation_steps)),
                folder=checkpoint_folder,
            )
            encoded = encoded.select(learned)
            rows = rows.select([place for place in learned if place < len(rows)])
        context = TaskContext(
            base=base,
            task=task,
            rows=rows,
            encoded=encoded,
            old_tasks=setup.old_tasks,
            adapter=setup.adapter,
            train=train,
        )
        learner = make_strategy(setup.strategy, setup.method, train.seed)
        learner.prepare(model, inherited, context)
        collate = context.collator()
        # answers that repeat are spread over the batches as labels are; spread evenly, answers of their own would mix
        # long rows with short ones
        balance_labels = train.balance_labels and (
            bool(task.labels) or MIN_REPEATS * len(set(map(tuple, encoded["answer_ids"]))) <= len(encoded)
        )
        trainer = AdapterTrainer(
            model=model,
            args=args,
            train_dataset=encoded,
            data_collator=PairCollator(collate) if task.learns_preferences else collate,
            strategy=learner,
            objective=PreferenceLoss(train.preference_beta) if task.learns_preferences else AnswerLoss(),
            balance_labels=balance_labels,
            is_sharded=shard == "base",
            validation=validation,
            on_log=on_log,
            on_checkpoint=on_checkpoint,
        )
        with trainer.accelerator.main_process_first():  # it removes incomplete checkpoints
            checkpoint = find_checkpoint(checkpoint_folder)
        started = time.perf_counter()
        products = nullcontext() if device_of(base.model).type in FP32_ON else base_precision(model)
        with products, compiled_layers(base.model) if train.torch_compile else nullcontext():
            trainer.run(checkpoint)
        seconds = time.perf_counter() - started
        state = replace(learner.finish(), num_arrivals=learner.num_arrivals + 1)
        if handed_on is not None:
            tensors = handed_on.kept_rows
            state = replace(state, tensors=tensors, stores=handed_on.stores, num_arrivals=handed_on.num_arrivals + 1)
        if args.process_index == 0:
            save_adapter(model, output_folder, state, base_name=base.name)

        num_steps, log = trainer.state.global_step, trainer.state.log_history
        resumed_from = None if checkpoint is None else int(checkpoint.name.rsplit("-", 1)[1])
        rows_per_step = train.batch_size * train.gradient_accumulation_steps
        seen, before = (_rows_until(step, num_rows, rows_per_step) for step in (num_steps, resumed_from or 0))
        notes = [
            *learner.notes(),
            *_validated(validation, train, num_rows, num_steps),
            *_lost(parent_state, state),
            *_cut(encoded, train, train.answer_tokens(task.labels)),
        ]
        return TrainingResult(
            num_steps=num_steps,
            seconds=seconds,
            rows_per_second=(seen - before) / seconds if seconds > 0 else 0.0,
            losses=tuple((int(figures["step"]), float(figures["loss"])) for figures in log if "loss" in figures),
            validation_losses=() if validation is None else validation.finite_losses,
            kept_step=None if validation is None else validation.best_step,
            resumed_from_step=resumed_from,
            fill=adapter_fill(model),
            notes=(*notes, *([describe_preferences(encoded)] if task.learns_preferences else [])),
        )
    finally:
        model.unload()
        set_attention(base.model, usual_attention)
        if train.gradient_checkpointing:
            base.model.gradient_checkpointing_disable()


def _divide(encoded: Dataset, num_learned: int, seed: int) -> tuple[list[int], list[int]]:
    """The places of the rows that are learned, and of those that are held back, with every answer in its share."""
    from deal_core.strategies.kept_rows import choose_rows

    answers = [tuple(ids) for ids in encoded["answer_ids"]]
    held_back = sorted(choose_rows(answers, len(encoded) - num_learned, seed))
    return sorted({*range(len(encoded))} - {*held_back}), held_back


def _encode(
    tasks: Sequence[tuple[TaskSchema, Dataset]],
    more_rows: Sequence[RehearsedRow],
    base: BaseModel,
    train: TrainConfig,
) -> Dataset:
    """Tokenise the rows of all tasks, and add rows that are tokens already and are not among them."""
    encoded = [
        encode_rows(
            rows,
            base.tokenizer,
            schema,
            max_prompt_tokens=train.max_prompt_tokens,
            max_answer_tokens=train.answer_tokens(schema.labels),
        )
        for schema, rows in tasks
        if len(rows)
    ]
    if not more_rows:
        return concatenate_datasets(encoded)
    known = {
        (tuple(prompt), tuple(answer))
        for part in encoded
        for prompt, answer in zip(part["prompt_ids"], part["answer_ids"], strict=True)
    }
    new = [
        {
            "prompt_ids": row.prompt_ids,
            "answer_ids": row.answer_ids,
            "length": len(row.prompt_ids) + len(row.answer_ids),
            "is_prompt_cut": False,
        }
        for row in more_rows
        if (tuple(row.prompt_ids), tuple(row.answer_ids)) not in known
    ]
    if new:
        encoded.append(Dataset.from_list(new))
    return concatenate_datasets(encoded)


def _kept_rows(kept: KeptSource | None) -> tuple[MethodState | None, list[RehearsedRow]]:
    """The state with the kept rows that are handed on, and those of them that are learned."""
    if kept is None:
        return None, []
    from deal_core.strategies.kept_rows import right_rows

    state = load_method_state(kept.folder)
    return state, [row for task in kept.learned for row in right_rows(state.kept_rows, task)]


def _rows_until(step: int, num_rows: int, rows_per_step: int) -> int:
    """Rows that the first `step` optimiser steps have seen; the last step of an epoch may have fewer rows."""
    epochs, steps = divmod(step, math.ceil(num_rows / rows_per_step))
    return epochs * num_rows + steps * rows_per_step


def _validated(validation: Validation | None, train: TrainConfig, num_rows: int, num_steps: int) -> Iterator[str]:
    """Notes about the rows that are held back."""
    if validation is not None:
        yield validation.describe(num_steps)
    elif train.validation_share:
        yield f"validation: none of {num_rows} rows are held back; train.validation_share takes {MIN_VALIDATED} or more"


def _lost(parent: MethodState | None, state: MethodState) -> Iterator[str]:
    """Notes about kept data of the parent that a change of strategy or settings dropped."""
    if parent is None:
        return
    if parent.kept_rows and not state.kept_rows:
        yield f"kept rows of {len(parent.kept_rows)} tasks are gone: rehearsal.rows is 0, or the strategy keeps none"
    if len(parent.tensors) > len(parent.kept_rows) and parent.strategy != state.strategy:
        yield (
            f"data that {parent.strategy} kept with the parent's adapter is gone: {state.strategy} of this release "
            "cannot use it"
        )


def _cut(encoded: Dataset, train: TrainConfig, answer_tokens: int) -> Iterator[str]:
    """Notes about cut rows. An answer of exactly the maximal length counts as cut."""
    if num_prompts := sum(encoded["is_prompt_cut"]):
        yield (
            f"{num_prompts} of {len(encoded)} training prompts are longer than train.max_prompt_tokens "
            f"({train.max_prompt_tokens}): the end of their text, or a chat's oldest turns, was left out"
        )
    num_answers = sum(len(answer_ids) == answer_tokens for answer_ids in encoded["answer_ids"])
    if num_answers:
        yield (
            f"{num_answers} of {len(encoded)} training answers fill train.max_answer_tokens "
            f"({answer_tokens}): longer answers were cut"
        )
