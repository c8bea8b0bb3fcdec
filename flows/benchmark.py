"""Benchmark: run strategies on a suite of tasks, cell by cell. Cells that are stored are not run again."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from prefect import flow
from pydantic import BaseModel, Field, field_validator

from deal_core.base_model.sources import DEFAULT_BASE
from deal_core.benchmark.cell import PROTOCOL, Cell, Scored, Scoring, make_cell
from deal_core.benchmark.suites import Part, digest_of, load_suite, order_of, tasks_folder
from deal_core.benchmark.summary import read_cells, summarise, tables
from deal_core.config import AdapterConfig, TrainConfig
from deal_core.data.reading.json_rows import unique_keys
from deal_core.data.schema import PromptForm
from deal_core.errors import ConfigError, in_one_line
from deal_core.limits import Count, Seed
from deal_core.method_config import MethodConfig
from deal_core.regular_file import complete_file
from deal_core.safe_text import brief
from infra.settings import HomeSettings
from tasks.adaptation.run import identify_base
from tasks.benchmark import make_cell_file
from tasks.progress import Interrupted, Stages, is_stopped, raise_if_stopped, reporter
from tasks.references import BaseRef
from tasks.spec import Address, parse

logger = logging.getLogger(__name__)
Value = TypeVar("Value")
Compared = Annotated[Value | None, Field(exclude_if=lambda value: value is None)]
"""A figure of a comparison with `deal`; a method that was not compared has no such field."""
LOOK_SECONDS = 2.0
LONGER = {"superni": {"max_prompt_tokens": 512}, "superni8": {"max_prompt_tokens": 512}}
"""Other defaults by suite: the instructions of superni alone take more than 160 tokens. The field cuts at 512."""


class BenchmarkSpec(BaseModel, frozen=True, extra="forbid"):
    """The cells of a benchmark: every strategy with every setting, order and seed."""

    data: Path
    """Folder of the tasks."""
    suite: str | None = None
    """Name of a suite; None: `tasks` is given."""
    orders: tuple[str, ...] = ("1",)
    tasks: tuple[str, ...] = ()
    """Tasks in the order of arrival, instead of a suite."""
    strategies: tuple[str, ...] = ("deal", "seq_lora")
    methods: tuple[MethodConfig, ...] = (MethodConfig(),)
    """Settings to compare. A strategy that does not read the differing fields has one cell for all of them."""
    seeds: tuple[Seed, ...] = (0,)
    rows: Count = 300
    part: Part = "reported"
    max_test_rows: Count | None = None
    scored: Scored = "all"
    scoring: Scoring = "generated"
    scores_unused: bool = False
    prompt: PromptForm = "plain"
    adapter: AdapterConfig = AdapterConfig()
    train: TrainConfig = TrainConfig(**PROTOCOL)
    base_model: Address = DEFAULT_BASE
    out: Path | None = None
    """Folder of the cells; None: HOME/benchmark."""
    keep_versions: Path | None = None
    """Folder for the versions of finished cells; None: they are deleted."""

    @field_validator("tasks")
    @classmethod
    def _every_task_once(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        repeated = [name for name, times in Counter(tasks).items() if times > 1]
        if repeated:
            raise ValueError(
                f"tasks names {', '.join(repeated)} more than once; give every task once, in the order of arrival"
            )
        return tasks

    @field_validator("train")
    @classmethod
    def _one_process_per_cell(cls, train: TrainConfig) -> TrainConfig:
        if train.num_processes != 1:
            raise ValueError(
                f"train.num_processes is {train.num_processes}, but one process trains a cell; run the command several "
                "times at once, and they share the cells"
            )
        return train

    @property
    def folder(self) -> Path:
        """Folder of the cells."""
        return self.out or HomeSettings().home / "benchmark"

    def sequences(self) -> tuple[tuple[str, ...], ...]:
        """Return the sequences of tasks.

        Raises:
            ConfigError: Neither a suite nor tasks are given, or both are given, or there is no such suite or order.
        """
        if (self.suite is None) == (not self.tasks):
            raise ConfigError("Give either a suite or tasks of your own.")
        return (self.tasks,) if self.suite is None else tuple(order_of(self.suite, order) for order in self.orders)


class CellOutcome(BaseModel, frozen=True):
    """The outcome of one cell."""

    file: str
    """Its file in the folder of the cells."""
    status: Literal["done", "stored", "failed"]
    """stored: it had been run before."""
    message: str = ""
    """Why it failed."""


class MethodFigures(BaseModel, frozen=True, extra="forbid"):
    """A strategy or a bound with its settings, over its cells of one order or of all orders.

    Shares are in percent, differences in points.
    """

    strategy: str
    changes: str
    """The settings that differ from the defaults."""
    orders: tuple[str, ...]
    """The orders of the tasks."""
    seeds: tuple[int, ...]
    num_cells: int
    average_accuracy: float
    """Mean over the tasks in the end, then over the cells."""
    accuracy_by_task: dict[str, float]
    forgetting: float | None
    backward_transfer: float | None
    forward_transfer: float | None
    rouge1: float | None
    perplexity_ratio: float | None
    """Perplexity on general text with the last version, as a multiple of the base model's."""
    rows_per_second: float | None
    """Median speed of the trainings."""
    adapter_bytes: tuple[int, ...] | None
    """Size of the first version's adapter and of the last one's."""
    stores: str | None
    """What of the old tasks stays stored."""
    state_bytes: int
    """Size of what the method keeps for later tasks."""
    minutes: float | None
    """Mean time of a cell."""
    difference_points_ci95: Compared[tuple[float, ...]] = None
    """Points by which it beats `deal` on the same rows: mean, and lower and upper end of the 95 % interval."""
    difference_num_cells: Compared[int] = None
    """Cells that were compared."""


class BenchmarkTable(BaseModel, frozen=True, extra="forbid"):
    """The methods that were run on one suite with the same settings."""

    suite: str
    protocol: tuple[Any, ...]
    """Training rows, part of the test rows, most test rows, scoring, adapter, base model, digest of the data, form of
    the prompts and training settings."""
    rows: tuple[MethodFigures, ...]


class BenchmarkResult(BaseModel, frozen=True):
    """The cells of this run, and tables of all cells in the folder."""

    cells: tuple[CellOutcome, ...]
    tables: tuple[BenchmarkTable, ...]

    @property
    def num_failed(self) -> int:
        """Number of cells that failed."""
        return sum(cell.status == "failed" for cell in self.cells)


@flow(name="benchmark")
async def benchmark(spec: BenchmarkSpec) -> BenchmarkResult:
    """Run the missing cells. Several runs with the same folder share the work.

    Raises:
        ConfigError: There is no such suite, order or strategy.
        DataValidationError: A task cannot be read, or has no test rows in the part to score on.
    """
    stages = Stages()
    base = await stages.run("base", identify_base, spec.base_model, spec.train.quantize)
    stages.done("base", base.name)
    waiting = await asyncio.to_thread(cells_of, spec, base)
    outcomes: dict[str, CellOutcome] = {}
    while waiting:
        busy: list[tuple[Cell, MethodConfig]] = []
        for cell, method in waiting:
            outcome = await _run(spec, stages, base, cell, method)
            if outcome is None:
                busy.append((cell, method))
            else:
                outcomes[outcome.file] = outcome
        if len(busy) == len(waiting):  # other processes hold these cells: wait until they are stored or free again
            raise_if_stopped()
            await asyncio.sleep(LOOK_SECONDS)
        waiting = busy
    shown = tuple(BenchmarkTable.model_validate(table) for table in write_summary(spec.folder))
    return BenchmarkResult(cells=tuple(outcomes.values()), tables=shown)


def cells_of(spec: BenchmarkSpec, base: BaseRef) -> list[tuple[Cell, MethodConfig]]:
    """Return every cell once, with its settings. For errors see `benchmark`."""
    cells: dict[str, tuple[Cell, MethodConfig]] = {}
    for tasks in spec.sequences():
        suite = load_suite(spec.data, tasks)
        for task in suite.values():
            task.part(spec.part)  # refuses an empty part before anything is trained
        data = digest_of(suite)
        for seed, strategy, method in product(spec.seeds, spec.strategies, spec.methods):
            cell = make_cell(
                strategy,
                tasks,
                method=method,
                seed=seed,
                train=replace(spec.train, seed=seed),
                rows=spec.rows,
                part=spec.part,
                max_test_rows=spec.max_test_rows,
                scored=spec.scored,
                scoring=spec.scoring,
                scores_unused=spec.scores_unused,
                adapter=spec.adapter,
                base=f"{base.name} {base.sha256}",
                data=data,
                prompt=spec.prompt,
            )
            cells.setdefault(cell.file_name, (cell, method))
    return list(cells.values())


def spec_from_options(
    *, data: str, train: str, methods: Sequence[str], adapter: str = "{}", **options: Any
) -> BenchmarkSpec:
    """Make a spec from a command's options. Options that are None or empty keep their defaults.

    `data` may be hf://datasets/OWNER/NAME, which is downloaded. `train`, `adapter` and each of `methods` are JSON
    objects: changes to the settings of that name. `options` are the other fields.

    Raises:
        ConfigError: A text is no JSON object, a value is invalid, or the Hub cannot be reached.
    """
    values = {name: value for name, value in options.items() if value not in (None, [], ())} | {
        "data": tasks_folder(data),
        "adapter": _json_object(adapter),
        "train": {**PROTOCOL, **LONGER.get(options.get("suite") or "", {}), **_json_object(train)},
    }
    if methods:
        values["methods"] = [_json_object(text) for text in methods]
    return parse(BenchmarkSpec, values, "options")


def _json_object(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{brief(text)} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{brief(text)} is no JSON object; give one such as {{}}.")
    return values


async def _run(
    spec: BenchmarkSpec, stages: Stages, base: BaseRef, cell: Cell, method: MethodConfig
) -> CellOutcome | None:
    """Run one cell; None if it is busy. A failed cell does not stop the others."""
    work = HomeSettings().home / "benchmark-work"  # not in work/, whose folders are lineages
    try:
        status = await stages.run(
            "cell", make_cell_file, base, cell, method, spec.data, spec.folder, work, spec.keep_versions
        )
    except Interrupted:
        raise
    except Exception as error:
        if is_stopped():
            raise
        logger.exception("Cell %s failed", cell.file_name)
        reporter().said(f"{cell.file_name} failed: {in_one_line(error)}")
        return CellOutcome(file=cell.file_name, status="failed", message=in_one_line(error))
    if status == "busy":
        return None
    stages.done("cell", f"{cell.file_name} {status}")
    return CellOutcome(file=cell.file_name, status=status)


def write_summary(out: Path) -> list[dict[str, Any]]:
    """Write summary.json into the cells' folder and return its content: a table per suite and protocol."""
    summary = [
        {"suite": table.suite, "protocol": json.loads(table.key), "rows": summarise(table)}
        for table in tables(read_cells(out))
    ]
    with complete_file(out / "summary.json") as part:
        part.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return summary
