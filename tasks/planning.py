"""What an adaptation will take, said before it: memory by kind, steps, time, and whether it fits the device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

from deal_core.base_model.config import BaseConfig, find_config
from deal_core.base_model.device import Device, current_device, parse_bytes
from deal_core.base_model.load import Precision, precision_name
from deal_core.config import AdapterConfig, TrainConfig
from deal_core.data.schema import DatasetManifest, TaskSchema
from deal_core.data.validate import build_dataset
from deal_core.errors import ConfigError
from deal_core.planning.memory import (
    HEADROOM,
    BatchShape,
    MemoryPlan,
    MethodShape,
    ModelSize,
    adapter_rank,
    largest_batch,
    limits_of,
    longest_of,
    plan_memory,
    rehearsed_rows,
)
from deal_core.planning.meta_model import measure_activations, measure_model
from deal_core.planning.suggestions import find_remedies
from infra.settings import HomeSettings
from infra.store.base import temporary_folder
from infra.store.keys import TRAIN_FILE
from tasks.adaptation.ingest import choose_schema, frozen_test_inputs
from tasks.context import current_store, local_file
from tasks.lineage.record import LineageRecord, read_record
from tasks.lineage.resolve_spec import arrival_of, choose_adapter, choose_base, choose_strategy
from tasks.references import VersionRef
from tasks.spec import AdaptSpec
from tasks.validate import known_champion

if TYPE_CHECKING:
    from datasets import Dataset

    from deal_core.training.train import TrainingSetup


import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from tasks.lineage.adapters import borrowed_parent

if TYPE_CHECKING:
    from datasets import Dataset

OnProgress = Callable[[str], None]
NUM_PROBE_STEPS = 3


class PlannedRemedy(BaseModel):
    """A change to the spec, and what the run takes with it."""

    model_config = ConfigDict(frozen=True)

    change: str
    total_bytes: int
    fits: bool


class PlanResult(BaseModel):
    """What a run will take."""

    model_config = ConfigDict(frozen=True)

    base: str
    model_type: str
    parameters: dict[str, int]
    adapter_parameters: int
    rank: int
    strategy: str
    precision: str
    num_train: int
    num_test: int
    num_rejected: int
    num_steps: int
    rows_per_step: int
    rehearsed_per_step: int
    """Questions about old tasks that every step asks beside its rows."""
    batch_rows: int
    longest_row_tokens: int
    longest_answer_tokens: int
    lengths_from: Literal["rows", "limits"]
    memory: dict[str, int]
    """Bytes by kind, at the peak of a step."""
    total_bytes: int
    device: str
    device_bytes: int
    verdict: Literal["fits", "tight", "refused"]
    remedies: tuple[PlannedRemedy, ...]
    seconds_per_step: float | None
    """From a probe on this machine; None: not probed."""
    expected_seconds: float | None
    notes: tuple[str, ...]

    @property
    def refused(self) -> bool:
        """Whether the run cannot fit."""
        return self.verdict == "refused"


def plan(
    spec: AdaptSpec,
    *,
    device_memory: str | None = None,
    precision: Precision = "auto",
    probe: bool = True,
    on_progress: OnProgress = lambda doing: None,
) -> PlanResult:
    """Work out what the run of a spec takes; nothing is kept, and no weights are fetched.

    Args:
        spec: The arrival, the lineage, and how it learns.
        device_memory: Memory to plan for, such as "24GiB"; None: what is free on this machine's device.
        precision: Of the frozen weights on the device that is planned for.
        probe: Take three steps, where the base model is on this machine and the plan fits.
        on_progress: Told what is being done.

    Raises:
        ConfigError: The config of the base model cannot be reached, or something in the spec does not fit.
        DataValidationError: The file is refused whole.
    """
    champion = known_champion(spec.lineage)
    record = read_record(current_store(), champion.adapter_uri) if champion else None
    on_progress("reading the base model's config")
    base = find_config(choose_base(spec, record), HomeSettings().cache_dir)
    run = _Run(spec, champion, record, base, precision_name(precision), choose_adapter(spec, record))
    with ExitStack() as stack:
        on_progress("reading the file")
        folder = stack.enter_context(temporary_folder())
        manifest = _check_rows(run, folder / "dataset")
        from datasets import Dataset

        rows = Dataset.from_parquet(str(folder / "dataset" / TRAIN_FILE), cache_dir=str(folder / "cache"))
        return _plan_rows(run, manifest, rows, device_memory, probe, on_progress)


@dataclass(frozen=True)
class _Run:
    """What a plan is about."""

    spec: AdaptSpec
    champion: VersionRef | None
    record: LineageRecord | None
    base: BaseConfig
    precision: Literal["bf16", "fp32"]
    adapter: AdapterConfig

    @property
    def strategy(self) -> str:
        return choose_strategy(self.spec, self.record)

    @property
    def source(self) -> str:
        return choose_base(self.spec, self.record)

    @property
    def old_tasks(self) -> list[TaskSchema]:
        return [known.schema for known in self.record.tasks] if self.record else []

    @property
    def num_versions(self) -> int:
        return len(self.record.matrix.trained) if self.record else 0


def _check_rows(run: _Run, folder: Path) -> DatasetManifest:
    """The dataset of the arrival, in a folder of its own, as ingest would make it."""
    arrival, store = arrival_of(run.spec), current_store()
    with ExitStack() as stack:
        source = stack.enter_context(local_file(store, arrival.data))
        test_source = stack.enter_context(local_file(store, arrival.test_data)) if arrival.test_data else None
        return build_dataset(
            source, choose_schema(store, arrival, run.record), folder, run.spec.data, test_source=test_source,
            frozen_test_inputs=frozen_test_inputs(store, run.record, arrival.task),
        )  # fmt: skip


def _plan_rows(
    run: _Run, manifest: DatasetManifest, rows: Dataset, device_memory: str | None, probe: bool, on_progress: OnProgress
) -> PlanResult:
    train, method, strategy = run.spec.train, run.spec.method, run.strategy
    rank = adapter_rank(run.adapter, strategy, run.num_versions)
    model = measure_model(run.base.config, run.adapter)
    num_old = len(run.old_tasks)
    on_progress("measuring rows and activations")
    num_rows = largest_batch(train, method, num_old_tasks=num_old, strategy=strategy)
    batch = _batch(run, manifest.task, rows, train, num_rows)
    here = current_device()
    device = here
    if device_memory is not None:
        device_bytes = parse_bytes(device_memory)
        device = Device(name="the device planned for", is_cpu=here.is_cpu, free_bytes=device_bytes,
                        total_bytes=device_bytes)  # fmt: skip
    notes: list[str] = []

    def memory_of(changed: TrainConfig, precision: str) -> MemoryPlan:
        rows_at_once = largest_batch(changed, method, num_old_tasks=num_old, strategy=strategy)
        shape = replace(_cut(batch, changed), num_rows=rows_at_once)
        return _memory(run, model, shape, changed, precision, rank, device)

    memory = memory_of(train, run.precision)
    limit = device.free_bytes
    refused = memory.total > limit
    remedies = find_remedies(memory_of, train, run.precision, limit) if refused else ()
    seconds = None
    if run.base.folder is None:
        notes.append("the base model's weights are not on this machine, so no step was timed (deal model fetch)")
    elif train.quantize != "none" and here.is_cpu:
        notes.append("quantized weights need a CUDA device, and this machine has none, so no step was timed")
    elif probe and not refused and memory.total <= here.free_bytes:
        on_progress("taking three steps")
        from deal_core.training.train import TrainingSetup

        setup = TrainingSetup(
            task=manifest.task, old_tasks=tuple(run.old_tasks), strategy=strategy, adapter=run.adapter, method=method,
            train=train,
        )  # fmt: skip
        seconds = probe_step(run.source, run.champion, rows, setup)
        if device_memory is not None:
            notes.append("the time is this machine's, not that of the device planned for")
    if train.num_processes > 1:
        notes.append(f"memory and time are those of one process with the whole batch; {train.num_processes} share it")
    if strategy in ("o_lora", "ella", "ewc", "lwf") and num_old:
        notes.append(f"what {strategy} keeps of earlier tasks beside the adapter is not counted")
    steps = train.num_steps(manifest.num_train)
    return PlanResult(
        base=run.source, model_type=model.model_type, parameters=dict(model.parameters),
        adapter_parameters=sum(model.num_factor_numbers(rank)), rank=rank, strategy=strategy, precision=run.precision,
        num_train=manifest.num_train, num_test=manifest.num_test, num_rejected=manifest.num_rejected, num_steps=steps,
        rows_per_step=train.batch_size * train.gradient_accumulation_steps,
        rehearsed_per_step=rehearsed_rows(method, num_old_tasks=num_old, strategy=strategy),
        batch_rows=batch.num_rows, longest_row_tokens=batch.num_tokens, longest_answer_tokens=batch.num_answer_tokens,
        lengths_from="limits" if run.base.folder is None else "rows",
        memory={name: getattr(memory, name) for name in
                ("weights", "adapter", "optimiser", "activations", "workspace")},
        total_bytes=memory.total, device=device.name, device_bytes=limit,
        verdict="refused" if refused else "fits" if memory.total <= HEADROOM * limit else "tight",
        remedies=tuple(PlannedRemedy(**vars(each)) for each in remedies),
        seconds_per_step=seconds, expected_seconds=None if seconds is None else seconds * steps, notes=tuple(notes),
    )  # fmt: skip


def _batch(run: _Run, task: TaskSchema, rows: Dataset, train: TrainConfig, num_rows: int) -> BatchShape:
    if run.base.folder is None:
        return limits_of(train, num_rows)
    tokenizer = _tokenizer(run.base.folder, run.source)
    return longest_of(rows, tokenizer, task, run.old_tasks, train, num_rows)


def _tokenizer(folder: Path, source: str) -> Any:
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # damaged files break their readers in many ways
        raise ConfigError(f"The tokenizer of {source!r} cannot be read ({type(error).__name__}: {error}).") from error


def _cut(batch: BatchShape, train: TrainConfig) -> BatchShape:
    """The batch with other limits of the rows' length."""
    answer = min(batch.num_answer_tokens, train.max_answer_tokens)
    prompt = min(batch.num_tokens - batch.num_answer_tokens, train.max_prompt_tokens)
    return replace(batch, num_tokens=prompt + answer, num_answer_tokens=answer)


def _memory(
    run: _Run, model: ModelSize, batch: BatchShape, train: TrainConfig, precision: str, rank: int, device: Device
) -> MemoryPlan:
    activations = measure_activations(run.base.config, replace(run.adapter, rank=rank), batch, precision,
                                      on_cpu=device.is_cpu)  # fmt: skip
    return plan_memory(
        model, activations, batch,
        MethodShape(rank=rank, strategy=run.strategy, method=run.spec.method, is_first_task=run.record is None),
        train=train,
        precision=precision,
        on_cpu=device.is_cpu,
    )


def probe_step(source: str, parent: VersionRef | None, rows: Dataset, setup: TrainingSetup) -> float:
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
            load_base(source, HomeSettings().cache_dir, quantize=setup.train.quantize),
            rows,
            replace(setup, train=replace(setup.train, max_steps=NUM_PROBE_STEPS, checkpoint_steps=0, num_processes=1)),
            parent_folder=parent_folder,
            output_folder=temporary / "adapter",
            checkpoint_folder=temporary / "checkpoints",
            on_log=on_log,
        )
    return (times[-1] - times[0]) / (len(times) - 1)
