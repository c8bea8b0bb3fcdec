"""Before a run: whether it can fit its device at all, and how long a step takes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from deal_core.config import AdapterConfig, MethodConfig, TrainConfig
from deal_core.data.schema import TaskSchema
from deal_core.errors import ConfigError
from infra.settings import HomeSettings
from infra.temporary import temporary_folder
from tasks.base import is_loaded
from tasks.context import current_store
from tasks.lineage.adapters import borrowed_parent
from tasks.references import VersionRef

if TYPE_CHECKING:
    from datasets import Dataset

NUM_PROBE_STEPS = 3


def refuse_what_cannot_fit(
    source: str, adapter: AdapterConfig, strategy: str, method: MethodConfig, train: TrainConfig, *, num_versions: int
) -> None:
    """Refuse a run whose weights, adapter and optimiser alone exceed the device, before the weights are loaded.

    Only what is certain refuses: a model that cannot be sized passes, and loading it has the last word.

    Args:
        source: The base model.
        adapter: Shape of the adapter.
        strategy: Name of the strategy.
        method: Settings of the strategies.
        train: Settings of the training.
        num_versions: Versions that the parent goes back to; 0 for the first task.

    Raises:
        ConfigError: It cannot fit; the message says what would.
    """
    if is_loaded(source):
        return
    from deal_core.base_model.config import find_config
    from deal_core.base_model.device import current_device
    from deal_core.base_model.load import precision_name
    from deal_core.planning.memory import NO_ACTIVATIONS, NO_BATCH, adapter_rank, plan_memory
    from deal_core.planning.meta_model import measure_model

    try:
        model = measure_model(find_config(source, HomeSettings().cache_dir).config, adapter)
    except ConfigError:
        return
    device, precision = current_device(), precision_name("auto")
    needed = plan_memory(
        model, NO_ACTIVATIONS, NO_BATCH, rank=adapter_rank(adapter, strategy, num_versions), strategy=strategy,
        method=method, train=train, is_first_task=num_versions == 0, precision=precision, on_cpu=device.is_cpu,
    ).certain  # fmt: skip
    held = precision if train.quantize == "none" else train.quantize
    if needed > device.total_bytes:
        raise ConfigError(
            f"{source} cannot be adapted here: whatever the batch, weights ({held}), adapter and optimiser take "
            f"{needed / 2**30:.1f} GiB, and {device.name} has {device.total_bytes / 2**30:.1f} GiB. "
            "Give a smaller base model or a device with more memory; deal plan says how much."
        )


def probe_step(
    source: str,
    parent: VersionRef | None,
    rows: Dataset,
    task: TaskSchema,
    old_tasks: Sequence[TaskSchema],
    *,
    strategy: str,
    adapter: AdapterConfig,
    method: MethodConfig,
    train: TrainConfig,
) -> float:
    """Take three optimiser steps on the rows and return the seconds of one; the first is left out, nothing is kept.

    Raises:
        ConfigError: The base model cannot be loaded.
    """
    from deal_core.base_model.load import load_base
    from deal_core.training.train import train_adapter

    times: list[float] = []

    def on_log(step: int, values: Mapping[str, float]) -> None:
        times.append(time.perf_counter())

    with (
        temporary_folder() as temporary,
        borrowed_parent(current_store(), parent) as parent_folder,
    ):
        train_adapter(
            load_base(source, HomeSettings().cache_dir, quantize=train.quantize),
            parent_folder=parent_folder,
            rows=rows,
            task=task,
            strategy=strategy,
            adapter=adapter,
            method=method,
            train=replace(train, max_steps=NUM_PROBE_STEPS, checkpoint_steps=0, num_processes=1),
            output_folder=temporary / "adapter",
            checkpoint_folder=temporary / "checkpoints",
            old_tasks=old_tasks,
            on_log=on_log,
        )
    return (times[-1] - times[0]) / (len(times) - 1)
