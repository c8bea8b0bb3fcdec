"""Plan an adaptation before it runs (`deal check --plan`): memory by kind, steps, time, and whether it fits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import transformers
from datasets import Dataset
from pydantic import BaseModel

from deal_core.adapter.files import METHOD_FILES
from deal_core.base_model.device import current_device
from deal_core.base_model.load import BaseConfig, find_config, load_base, precision_name
from deal_core.config import TrainConfig
from deal_core.data.dataset import ArrivalRefusedError, build_dataset
from deal_core.data.schema import DatasetManifest, TaskSchema
from deal_core.errors import ConfigError, DataValidationError
from deal_core.planning.devices import PlannedDevice, find_device
from deal_core.planning.memory import (
    HEADROOM,
    BatchShape,
    MemoryPlan,
    MethodShape,
    Remedy,
    adapter_rank,
    find_remedies,
    largest_batch,
    longest_of,
    plan_memory,
)
from deal_core.planning.meta_model import measure_model
from deal_core.safe_text import brief
from deal_core.selection.choose import rows_read
from deal_core.strategies import strategy_class
from deal_core.strategies.strategy import KeptSize, PlannedArrival
from deal_core.training.train import TrainingSetup, train_adapter
from infra.settings import HomeSettings, LaunchSettings
from infra.store.base import ObjectStore, temporary_folder
from infra.store.keys import TRAIN_FILE
from infra.versions import Version, Versions
from tasks.lineage.choices import choose_adapter, choose_base, choose_strategy
from tasks.lineage.record import read_record
from tasks.lineage.version_files import borrowed_adapter, download_files
from tasks.spec import AdaptSpec
from tasks.task_schema import choose_schema, landing_of

OnProgress = Callable[[str], None]
NUM_PROBE_STEPS = 3
FORWARD_SHARE = 1 / 3
"""Time that reading a row takes, as a share of a training step's time per row: the backward pass takes two of three
parts of the computation."""


class PlanResult(BaseModel, frozen=True):
    """What a run takes."""

    base: str
    """The base model's name, Hub id, folder or file."""
    model_type: str
    """Its architecture, as Transformers calls it."""
    parameters: dict[str, int]
    """Kind → number of the base model's parameters."""
    adapter_parameters: int
    """Number of the adapter's parameters."""
    rank: int
    strategy: str
    precision: str
    num_train: int
    num_chosen: int
    """Training rows that are trained on, before the noise gate leaves rows out; see `SelectionConfig.keep`."""
    num_test: int
    num_rejected: int
    """Bad rows."""
    num_steps: int
    learning_rate: float
    """Rate of the first step."""
    rows_per_step: int
    rehearsed_per_step: int
    """Rows of old tasks in every step, in addition to the step's own rows."""
    num_kept: int
    """Training rows of this arrival that the version keeps, for later arrivals to rehearse."""
    batch_rows: int
    """Rows that are computed at once."""
    longest_row_tokens: int
    longest_answer_tokens: int
    lengths_from: Literal["rows", "limits"]
    """rows: the lengths are those of the rows. limits: they are the spec's, as the base model is not on this
    machine."""
    memory: dict[str, int]
    """Bytes by kind, at the peak of a step."""
    total_bytes: int
    """All kinds together."""
    device: str
    device_bytes: int
    """The memory to plan for."""
    verdict: Literal["fits", "tight", "refused"]
    """tight: it fits, with less than a tenth to spare."""
    remedies: tuple[Remedy, ...]
    """Changes that save memory; empty if the run fits."""
    seconds_per_step: float | None
    """From a probe on this machine; None: there was no probe."""
    expected_seconds: float | None
    """Time of the training, from the same probe."""
    notes: tuple[str, ...]
    """Remarks for people."""

    @property
    def refused(self) -> bool:
        """Whether the run cannot fit."""
        return self.verdict == "refused"


@dataclass(frozen=True, kw_only=True)
class _Run:
    """The run that is planned."""

    source: str
    base: BaseConfig
    precision: Literal["bf16", "fp32"]
    champion: Version | None
    rank: int
    setup: TrainingSetup
    arrival: PlannedArrival

    def longest_prompt(self, train: TrainConfig) -> int:
        """A kept row of an old task is as long as it was when that task was learned."""
        return max([train.max_prompt_tokens, *(rows.longest_prompt for rows in self.arrival.kept.values())])

    @property
    def rehearsed_per_step(self) -> int:
        return strategy_class(self.setup.strategy).rehearsed_per_step(self.setup.method, self.arrival)

    def largest_batch(self, train: TrainConfig, *, on_cpu: bool) -> int:
        return largest_batch(
            train,
            rehearsed_per_step=self.rehearsed_per_step,
            on_cpu=on_cpu,
            learns_preferences=self.setup.task.learns_preferences,
        )


def plan(
    store: ObjectStore,
    spec: AdaptSpec,
    *,
    device: str | None = None,
    probe: bool = True,
    on_progress: OnProgress = lambda doing: None,
) -> PlanResult:
    """Compute what the run of a spec takes. Nothing is stored and no weights are fetched.

    Args:
        store: The store, which has the lineage.
        spec: The arrival, the lineage and the settings.
        device: Devices to plan for, such as "1x A100 80GB"; see `deal_core.planning.devices`. None: this machine's,
            with its free memory.
        probe: Time three steps, if the base model is on this machine, which is planned for, and the run fits.
        on_progress: Called with the current step in a few words.

    Raises:
        ConfigError: The config of the base model cannot be read, or a setting does not fit.
        DataValidationError: The whole file is refused.
    """
    planned = None if device is None else find_device(device)
    if planned is not None and planned.count < spec.train.num_processes:
        raise ConfigError(
            f"train.num_processes is {spec.train.num_processes}, and --device {brief(device)} has fewer devices; name "
            "as many devices, or lower train.num_processes.",
            code="device",
        )
    champion = Versions(store).champion(spec.lineage)
    record = read_record(store, champion) if champion else None
    on_progress("reading the base model's config")
    source = choose_base(spec, record)
    base = find_config(source, HomeSettings().cache_dir)
    adapter, strategy = choose_adapter(spec, record), choose_strategy(spec, record)
    num_versions = len(record.matrix.trained) if record else 0
    on_progress("reading the file")
    with temporary_folder() as folder:
        schema = choose_schema(store, spec.task, record)
        with landing_of(store, spec.task, schema, record, spec.data, parent=champion) as landing:
            try:
                manifest = build_dataset(landing, folder / "dataset")  # by the rules of ingest
            except ArrivalRefusedError as error:
                raise DataValidationError(f"{error.report.refusal} deal check lists the bad rows.") from None
        rows = Dataset.from_parquet(str(folder / "dataset" / TRAIN_FILE), cache_dir=str(folder / "cache"))
        old_tasks = tuple(known.schema for known in record.tasks) if record else ()
        num_chosen = spec.selection.num_kept(manifest.num_train)
        run = _Run(
            source=source,
            base=base,
            precision=precision_name("auto") if planned is None else planned.precision,
            champion=champion,
            rank=adapter_rank(adapter, strategy, num_versions),
            setup=TrainingSetup(
                task=manifest.task,
                old_tasks=old_tasks,
                strategy=strategy,
                adapter=adapter,
                method=spec.method,
                train=spec.train,
            ),
            arrival=PlannedArrival(
                task=manifest.task,
                old_tasks=old_tasks,
                kept=_kept_by(store, champion, old_tasks) if champion else {},
                num_rows=num_chosen,
                num_steps=spec.train.num_steps(num_chosen),
            ),
        )
        return _plan_rows(store, run, manifest, rows, planned, probe, on_progress)


def _kept_by(store: ObjectStore, champion: Version, tasks: Iterable[TaskSchema]) -> dict[str, KeptSize]:
    """The sizes of the rows that the champion keeps of its tasks."""
    from deal_core.adapter.state import load_method_state
    from deal_core.strategies.kept_rows import sizes_of

    with temporary_folder() as folder:
        download_files(store, champion.adapter_uri, folder, METHOD_FILES)
        return sizes_of(load_method_state(folder).kept_rows, (task.name for task in tasks))


def _plan_rows(
    store: ObjectStore,
    run: _Run,
    manifest: DatasetManifest,
    rows: Dataset,
    planned: PlannedDevice | None,
    probe: bool,
    on_progress: OnProgress,
) -> PlanResult:
    setup, train = run.setup, run.setup.train
    model = measure_model(run.base.config, setup.adapter)
    on_progress("measuring rows")
    shape = MethodShape(rank=run.rank, strategy=setup.strategy, method=setup.method, is_first_task=run.champion is None)
    device = current_device() if planned is None else planned
    batch = _batch(run, rows, on_cpu=device.is_cpu)
    num_shards = train.num_processes if LaunchSettings().shard == "base" else 1

    def memory_of(train: TrainConfig, precision: str) -> MemoryPlan:
        """The memory with other settings of the training and another precision than those of the run."""
        answer = min(batch.num_answer_tokens, train.answer_tokens(setup.task.labels))
        prompt = min(batch.num_tokens - batch.num_answer_tokens, run.longest_prompt(train))
        num_rows = run.largest_batch(train, on_cpu=device.is_cpu)
        rows = replace(batch, num_rows=num_rows, num_tokens=prompt + answer, num_answer_tokens=answer)
        return plan_memory(
            model,
            rows,
            shape,
            train=train,
            precision=precision,
            on_cpu=device.is_cpu,
            num_shards=num_shards,
        )

    memory, limit = memory_of(train, run.precision), device.free_bytes
    refused = memory.total > limit
    seconds, notes = None, list[str]()
    if planned is not None:
        notes.append("no step was timed, as the plan is not for this machine")
        if planned.count > train.num_processes:
            notes.append(
                f"{train.num_processes} of {planned.count} devices would be used; train.num_processes: {planned.count} "
                "uses all"
            )
    elif run.base.folder is None:
        notes.append("the base model's weights are not on this machine, so no step was timed (deal model fetch)")
    elif num_shards > 1:
        notes.append(f"the base model is divided among {num_shards} processes (DEAL_SHARD), so no step was timed")
    elif train.quantize != "none" and device.is_cpu:
        notes.append("quantized weights need a CUDA device, and this machine has none, so no step was timed")
    elif probe and not refused:
        on_progress("taking three steps")
        seconds = _probe_step(store, run, rows)
    notes += _notes(run, manifest.num_train, seconds)
    remedies = find_remedies(memory_of, train, run.precision, limit) if refused else ()
    num_parameters = sum(model.parameters.values())
    keeps_rows = "rehearsal" in strategy_class(setup.strategy).reads
    return PlanResult(
        base=run.source,
        model_type=model.model_type,
        parameters=dict(model.parameters),
        adapter_parameters=sum(model.num_factor_numbers(run.rank)),
        rank=run.rank,
        strategy=setup.strategy,
        precision=run.precision,
        num_train=manifest.num_train,
        num_chosen=run.arrival.num_rows,
        num_test=manifest.num_test,
        num_rejected=manifest.num_rejected,
        num_steps=run.arrival.num_steps,
        learning_rate=train.preference_learning_rate if setup.task.learns_preferences else train.rate(num_parameters),
        rows_per_step=train.rows_per_step,
        rehearsed_per_step=run.rehearsed_per_step,
        num_kept=setup.method.rehearsal.num_kept(run.arrival.num_rows) if keeps_rows else 0,
        batch_rows=batch.num_rows,
        longest_row_tokens=batch.num_tokens,
        longest_answer_tokens=batch.num_answer_tokens,
        lengths_from="limits" if run.base.folder is None else "rows",
        memory=vars(memory),
        total_bytes=memory.total,
        device=device.name,
        device_bytes=limit,
        verdict="refused" if refused else "fits" if memory.total <= HEADROOM * limit else "tight",
        remedies=remedies,
        seconds_per_step=seconds,
        expected_seconds=None if seconds is None else seconds * run.arrival.num_steps,
        notes=tuple(notes),
    )


def _notes(run: _Run, num_train: int, seconds: float | None) -> Iterator[str]:
    """What the figures leave out. `seconds` is the time of a step."""
    setup, train = run.setup, run.setup.train

    def reading(why: str, num_read: int) -> str:
        """A model reads rows before the training."""
        time = ""
        if seconds is not None:
            taken = FORWARD_SHARE * seconds * num_read / train.rows_per_step
            time = f", about {round(taken):,} s that are not counted above"
        return f"{why}: a model reads {num_read:,} texts before the training{time}"

    if train.num_processes > 1:
        yield f"memory and time are those of one process with the whole batch; {train.num_processes} share it"
    if num_asked := strategy_class(setup.strategy).num_answered(setup.method, run.arrival):
        yield reading("the parent answers rows of old tasks", num_asked)
    if num_read := rows_read(setup, num_train, has_parent=run.champion is not None):
        yield reading("the rows are chosen first", num_read)
    if setup.task.learns_preferences:
        yield reading("the parent's answers are the reference", run.arrival.num_rows)


def _batch(run: _Run, rows: Dataset, *, on_cpu: bool) -> BatchShape:
    setup, num_rows = run.setup, run.largest_batch(run.setup.train, on_cpu=on_cpu)
    if run.base.folder is None:
        answer = setup.train.answer_tokens(setup.task.labels)
        prompt = run.longest_prompt(setup.train)
        return BatchShape(num_rows=num_rows, num_tokens=prompt + answer, num_answer_tokens=answer)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(run.base.folder, trust_remote_code=False)
    except Exception as error:  # a damaged file can raise any error
        why = f"{type(error).__name__}: {error}"
        raise ConfigError(f"The tokenizer of {run.source!r} cannot be read ({why}).") from error
    return longest_of(rows, tokenizer, setup.task, setup.old_tasks, setup.train, num_rows, run.arrival.kept)


def _probe_step(store: ObjectStore, run: _Run, rows: Dataset) -> float:
    """Train a few steps and return the seconds of one step. The first step is not counted, and nothing is kept."""
    times: list[float] = []
    train = replace(run.setup.train, max_steps=NUM_PROBE_STEPS, checkpoint_steps=0, num_processes=1)
    if run.setup.task.learns_preferences:  # the parent reads all of them first
        num_rows = NUM_PROBE_STEPS * train.rows_per_step
        rows = rows.select(range(0, len(rows), max(1, len(rows) // num_rows)))
    parent = borrowed_adapter(store, run.champion, with_method=True) if run.champion else nullcontext()
    with temporary_folder() as temporary, parent as parent_folder:
        base = load_base(run.source, HomeSettings().cache_dir, precision=run.precision, quantize=train.quantize)
        train_adapter(
            base,
            rows,
            replace(run.setup, train=train),
            parent_folder=parent_folder,
            output_folder=temporary / "adapter",
            checkpoint_folder=temporary / "checkpoints",
            on_log=lambda step, values: times.append(time.perf_counter()),
        )
    return (times[-1] - times[0]) / (len(times) - 1)
