"""The benchmark flow on the tiny base: cells are stored, reused, shared between processes, and fail separately."""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from typer.testing import CliRunner

from benchmarks.tiny_tasks import COLOURS_AND_SIZES, write_tasks
from deal_core.adapter.files import WEIGHTS_FILE
from deal_core.config import AdapterConfig, TrainConfig
from deal_core.errors import ConfigError, DataValidationError
from deal_core.method_config import MethodConfig, RehearsalConfig
from flows.benchmark import PROTOCOL, BenchmarkResult, BenchmarkSpec, benchmark, cells_of, spec_from_options
from flows.cli.app import app
from tasks.adaptation.run import identify_base

BENCHMARK_DATA = os.environ.get("DEAL_BENCHMARK_DATA", "")
"""Folder of the field's tasks, which is no part of this project."""

pytestmark = pytest.mark.usefixtures("prefect_api", "home")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_tasks(tmp_path)


@pytest.fixture
def spec(data: Path, tiny_base: Path) -> BenchmarkSpec:
    return spec_from_options(
        data=str(data),
        tasks=list(COLOURS_AND_SIZES),
        rows=8,
        base_model=str(tiny_base),
        train='{"batch_size": 4, "max_prompt_tokens": 64}',
        methods=[],
    )


def run(spec: BenchmarkSpec, **changes: Any) -> BenchmarkResult:
    return asyncio.run(benchmark(spec.model_copy(update=changes)))


def stamps(spec: BenchmarkSpec) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in spec.folder.glob("*-*.json")}


def test_options_of_scoring_reach_the_cell_and_its_versions_are_kept(data: Path, tiny_base: Path, home: Path) -> None:
    command = ["benchmark", "--data", str(data), "--task", "colours", "--strategy", "seq_lora", "--rows", "8"]
    command += ["--base", str(tiny_base), "--train", '{"max_steps": 1, "max_prompt_tokens": 64}', "--json"]
    options = ["--scoring", "likeliest", "--scores-unused", "--keep-versions", str(home / "kept")]
    (cell,) = json.loads(CliRunner().invoke(app, [*command, *options]).stdout)["cells"]
    settings = json.loads((home / "benchmark" / cell["file"]).read_text())["settings"]
    assert (settings["scoring"], settings["scores_unused"]) == ("likeliest", True)
    assert (home / "kept" / Path(cell["file"]).stem / "0" / WEIGHTS_FILE).is_file()


def test_cells_are_stored_and_not_run_again(spec: BenchmarkSpec, home: Path) -> None:
    result = run(spec)
    assert [cell.status for cell in result.cells] == ["done", "done"] and result.num_failed == 0
    assert set(stamps(spec)) == {cell.file for cell in result.cells}
    (table,) = result.tables
    summary = json.loads((spec.folder / "summary.json").read_text())
    assert json.dumps(summary) == json.dumps([table.model_dump(mode="json")]), "--json prints what the file says"
    assert [row.strategy for row in table.rows] == ["deal", "seq_lora"]
    assert [row.difference_points_ci95 is not None for row in table.rows] == [False, True]
    left = {path.name for path in (home / "benchmark-work").iterdir() if path.is_dir()}
    assert left == {"first-versions"}, "a cell's versions are deleted after its figures were stored"

    before = stamps(spec)
    again = run(spec, strategies=("seq_lora", "deal", "base"))
    assert [cell.status for cell in again.cells] == ["stored", "stored", "done"]
    assert {name: stamp for name, stamp in stamps(spec).items() if name in before} == before
    assert again.tables[0].rows[0].strategy == "base"


def test_cells_whose_first_version_another_process_makes_come_after_all_others(spec: BenchmarkSpec, home: Path) -> None:
    keeps_none = MethodConfig(rehearsal=RehearsalConfig(rows=0))  # else its first version has kept rows
    spec = spec.model_copy(update={"strategies": ("deal", "seq_lora", "base"), "methods": (keeps_none,)})
    deal, plain, _ = (cell for cell, _ in cells_of(spec, identify_base(spec.base_model)))
    shared = deal.shared_digest()
    assert shared is not None and shared == plain.shared_digest()
    lock = home / "benchmark-work" / "first-versions" / f"{shared}.lock"
    result = asyncio.run(run_while_held(spec, lock, "base"))
    first, *others = (cell.file.split("-")[0] for cell in result.cells)
    assert (first, {*others}) == ("base", {"deal", "seq_lora"})
    assert [cell.status for cell in result.cells] == ["done"] * 3


async def run_while_held(spec: BenchmarkSpec, path: Path, free: str) -> BenchmarkResult:
    """Run the benchmark while another holds a lock; release the lock once the cell of the strategy `free` is stored."""
    path.parent.mkdir(parents=True)
    lock = FileLock(path, thread_local=False)
    lock.acquire()
    running = asyncio.ensure_future(benchmark(spec))
    while not any(name.startswith(free) for name in stamps(spec)):
        assert not running.done()
        await asyncio.sleep(0.05)
    assert [name.split("-")[0] for name in stamps(spec)] == [free]
    lock.release()
    return await running


def test_a_cell_that_fails_does_not_lose_the_others(spec: BenchmarkSpec) -> None:
    """Rank 40 does not fit a layer of width 32. Only training finds this error."""
    result = run(spec, strategies=("base", "seq_lora"), adapter=spec.adapter.__class__(rank=40))
    assert [cell.status for cell in result.cells] == ["done", "failed"] and result.num_failed == 1
    assert "rank" in result.cells[1].message and len(stamps(spec)) == 1


def test_the_commands_adapter_and_training_reach_the_cells(
    spec: BenchmarkSpec, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[BenchmarkSpec] = []

    async def ask(given: BenchmarkSpec) -> BenchmarkResult:
        asked.append(given)
        return BenchmarkResult(cells=(), tables=())

    monkeypatch.setattr("flows.benchmark.benchmark", ask)
    words = ["benchmark", "--data", str(spec.data), "--base", spec.base_model, "--home", str(home), "--rows", "8"]
    words += [word for name in COLOURS_AND_SIZES for word in ("--task", name)]
    for options in ([], ["--adapter", '{"rank": 8}'], ["--train", '{"num_epochs": 2}'], ["--prompt", "chat"]):
        result = CliRunner().invoke(app, [*words, *options])
        assert result.exit_code == 0, result.output
    base = identify_base(spec.base_model)
    plain, narrow, longer, chat = (cells_of(given, base)[0][0] for given in asked)
    assert plain.adapter == AdapterConfig() and plain.train == TrainConfig(**PROTOCOL)
    assert narrow == replace(plain, adapter=AdapterConfig(rank=8)) and narrow.file_name != plain.file_name
    assert longer == replace(plain, train=replace(plain.train, num_epochs=2))
    assert chat == replace(plain, prompt="chat")
    generation = spec_from_options(data=str(spec.data), train='{"num_epochs": 2}', methods=[], suite="superni")
    assert (generation.train.max_prompt_tokens, generation.train.num_epochs) == (512, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ['{"deal": {"cor": 1}}']}, r"unknown key 'methods.0.deal.cor'"),
        ({"methods": ['{"memory": "rows"}']}, r"'methods.0.memory' is no setting any more: set rehearsal.rows, "),
        ({"train": '{"speed": 1}'}, r"unknown key 'train.speed'; remove it, or give one of learning_rate"),
        ({"train": "core=soft"}, "is not JSON"),
        (
            {"adapter": '{"rnk": 8}'},
            r"unknown key 'adapter.rnk'; remove it, or give one of rank, alpha, rslora, target_modules, dropout",
        ),
        ({"train": '{"num_processes": 2}'}, "num_processes is 2, but one process trains a cell"),
        ({"part": "test"}, "part is 'test'; give 'dev'"),
        ({"suite": "4"}, "either a suite or tasks"),
        ({"tasks": ["sizes", "colours", "sizes"]}, "tasks names sizes more than once; give every task once"),
    ],
)
def test_unknown_settings_are_refused(options: dict[str, Any], message: str, data: Path, tiny_base: Path) -> None:
    given = {
        "data": str(data),
        "tasks": list(COLOURS_AND_SIZES),
        "train": "{}",
        "methods": [],
        "base_model": str(tiny_base),
        **options,
    }
    with pytest.raises(ConfigError, match=message):
        cells_of(spec_from_options(**given), identify_base(str(tiny_base)))


def test_a_task_without_rows_in_the_part_is_refused_before_another_is_learned(spec: BenchmarkSpec) -> None:
    rows = (spec.data / "sizes.test.jsonl").read_text().splitlines(keepends=True)
    (spec.data / "sizes.test.jsonl").write_text("".join(rows[:2]))
    with pytest.raises(DataValidationError, match="Task 'sizes' has no row in part 'dev', having 2 test rows"):
        run(spec, part="dev")
    assert not stamps(spec)


@pytest.mark.skipif("DEAL_BENCHMARK_DATA" not in os.environ, reason="DEAL_BENCHMARK_DATA names no folder of tasks")
def test_a_suite_of_the_field_runs(tiny_base: Path, tmp_path: Path) -> None:
    spec = spec_from_options(
        data=BENCHMARK_DATA,
        suite="3",
        strategies=["deal", "replay", "joint", "per_task", "base"],
        rows=8,
        max_test_rows=4,
        base_model=str(tiny_base),
        out=tmp_path / "cells",
        methods=[],
        train='{"batch_size": 4, "max_prompt_tokens": 160}',
    )
    result = run(spec)
    assert [cell.status for cell in result.cells] == ["done"] * 5
    (table,) = result.tables
    assert table.suite == "3"
    assert {row.strategy: len(row.accuracy_by_task) for row in table.rows} == {
        "base": 3,
        "per_task": 3,
        "joint": 3,
        "deal": 3,
        "replay": 3,
    }
