"""The comparison of strategies on the tiny base: cells are stored, reused and shared between processes."""

from __future__ import annotations

import json
import os
import re
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from typer.testing import CliRunner

from benchmarks.compare import app, cells_of
from benchmarks.continual.cell import PROTOCOL, Cell
from benchmarks.tiny_tasks import COLOURS_AND_SIZES, write_tasks
from deal_core.adapter.files import WEIGHTS_FILE
from deal_core.config import AdapterConfig, TrainConfig
from deal_core.errors import DataValidationError
from deal_core.method_config import MethodConfig, RehearsalConfig
from tasks.adaptation.run import identify_base

BENCHMARK_DATA = os.environ.get("DEAL_BENCHMARK_DATA", "")
"""Folder of the field's tasks, which is no part of this project."""
TRAIN = {"batch_size": 4, "max_prompt_tokens": 64}
NO_ROWS = MethodConfig(rehearsal=RehearsalConfig(rows=0))

pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_tasks(tmp_path)


@pytest.fixture
def words(data: Path, tiny_base: Path, tmp_path: Path) -> list[str]:
    """The options of the command for two tasks."""
    folders = {"--data": data, "--base": tiny_base, "--out": tmp_path / "cells", "--work": tmp_path / "work"}
    tasks = [word for name in COLOURS_AND_SIZES for word in ("--task", name)]
    named = [word for name, folder in folders.items() for word in (name, str(folder))]
    return [*named, *tasks, "--rows", "8", "--train", json.dumps(TRAIN)]


def run(words: list[str], *more: str) -> tuple[dict[str, str], str]:
    """The status of each cell by its file, in the order in which they ended, and what was printed."""
    result = CliRunner().invoke(app, [*words, *more], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    # a library's progress bar may stand before the name in its line
    return dict(re.findall(r"([\w.-]+\.json): (.+)", result.output)), result.output


def stamps(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*-*.json")}


def cells(data: Path, tiny_base: Path, *methods: MethodConfig, **changes: Any) -> list[Cell]:
    """The cells of deal and plain LoRA, as the command makes them with the options of `words`."""
    base = identify_base(str(tiny_base))
    given: dict[str, Any] = {
        "train": TrainConfig(**{**PROTOCOL, **TRAIN}),
        "adapter": AdapterConfig(),
        "rows": 8,
        "part": "reported",
        "max_test_rows": None,
        "scored": "all",
        "base": f"{base.name} {base.sha256}",
        "seeds": [0],
        **changes,
    }
    tasks, seeds = tuple(COLOURS_AND_SIZES), given.pop("seeds")
    made = cells_of(data, [tasks], ["deal", "seq_lora"], methods or [MethodConfig()], seeds, **given)
    return [cell for cell, _ in made]


def test_cells_are_stored_and_not_run_again(words: list[str], data: Path, tiny_base: Path, tmp_path: Path) -> None:
    statuses, output = run(words)
    assert statuses == {cell.file_name: "done" for cell in cells(data, tiny_base)}
    assert "deal" in output and "seq_lora" in output and "8 training rows a task, reported test rows" in output
    left = {path.name for path in (tmp_path / "work").iterdir() if path.is_dir()}
    assert left == {"first-versions"}, "a cell's versions are deleted after its figures were stored"

    before = stamps(tmp_path / "cells")
    again, _ = run(words, "--strategy", "seq_lora", "--strategy", "deal", "--strategy", "base")
    assert [*again.values()] == ["stored", "stored", "done"]
    assert {name: stamp for name, stamp in stamps(tmp_path / "cells").items() if name in before} == before


def test_options_reach_the_cell_and_its_versions_are_kept(words: list[str], tmp_path: Path) -> None:
    options = ["--scoring", "likeliest", "--scores-unused", "--keep-versions", str(tmp_path / "kept")]
    options += ["--strategy", "seq_lora", "--adapter", '{"rank": 8}', "--prompt", "chat", "--scored", "last"]
    ((file, _),) = run(words, *options)[0].items()
    settings = json.loads((tmp_path / "cells" / file).read_text())["settings"]
    assert (settings["scoring"], settings["scores_unused"], settings["scored"]) == ("likeliest", True, "last")
    assert settings["adapter"]["rank"] == 8 and settings["prompt"] == "chat"
    assert settings["train"]["batch_size"] == 4 and settings["train"]["learning_rate"] == PROTOCOL["learning_rate"]
    assert (tmp_path / "kept" / Path(file).stem / "0" / WEIGHTS_FILE).is_file()


@pytest.mark.parametrize("shared", [False, True])
def test_a_cell_that_another_process_holds_is_left_to_it(
    shared: bool, words: list[str], data: Path, tiny_base: Path, tmp_path: Path
) -> None:
    """The other process ends without a result, so this process runs the cell after all others.

    It holds a cell, or the first version that two cells share; a cell with kept rows shares none.
    """
    deal, plain = cells(data, tiny_base, NO_ROWS)
    assert deal.shared_digest() == plain.shared_digest()
    name = f"first-versions/{deal.shared_digest()}" if shared else deal.digest()
    lock = FileLock(tmp_path / "work" / f"{name}.lock", thread_local=False)
    Path(lock.lock_file).parent.mkdir(parents=True)
    lock.acquire()

    def release_after_the_free_cell() -> None:
        while not stamps(tmp_path / "cells"):
            threading.Event().wait(0.05)
        lock.release()

    thread = threading.Thread(target=release_after_the_free_cell, daemon=True)
    thread.start()
    strategies = [word for name in ("deal", "seq_lora", "base") for word in ("--strategy", name)]
    statuses, _ = run(words, *strategies, "--method", '{"rehearsal": {"rows": 0}}')
    thread.join()
    first, *others = (file.split("-")[0] for file in statuses)
    assert (first, {*others}) == (("base", {"deal", "seq_lora"}) if shared else ("seq_lora", {"base", "deal"}))
    assert [*statuses.values()] == ["done"] * 3


def test_every_method_setting_that_a_strategy_reads_has_its_cell(data: Path, tiny_base: Path) -> None:
    made = cells(data, tiny_base, MethodConfig(), NO_ROWS, seeds=[0, 1])
    assert sorted((cell.strategy, cell.seed) for cell in made) == [
        *[("deal", 0)] * 2,
        *[("deal", 1)] * 2,
        ("seq_lora", 0),
        ("seq_lora", 1),
    ]
    assert {cell.train.seed for cell in made} == {0, 1}
    rows = [cell.method["rehearsal.rows"] for cell in made if cell.strategy == "deal"]
    assert sorted(rows) == [0, 0, 50, 50]
    chat = cells(data, tiny_base, prompt="chat")[0]
    assert chat == replace(cells(data, tiny_base)[0], prompt="chat")


def test_a_task_without_rows_in_the_part_is_refused_before_another_is_learned(
    words: list[str], data: Path, tmp_path: Path
) -> None:
    rows = (data / "sizes.test.jsonl").read_text().splitlines(keepends=True)
    (data / "sizes.test.jsonl").write_text("".join(rows[:2]))
    with pytest.raises(DataValidationError, match="Task 'sizes' has no row in part 'dev', having 2 test rows"):
        run(words, "--part", "dev")
    assert not stamps(tmp_path / "cells")


@pytest.mark.skipif("DEAL_BENCHMARK_DATA" not in os.environ, reason="DEAL_BENCHMARK_DATA names no folder of tasks")
def test_a_suite_of_the_field_runs(tiny_base: Path, tmp_path: Path) -> None:
    strategies = ("deal", "replay", "joint", "per_task", "base")
    words = ["--data", BENCHMARK_DATA, "--suite", "3", "--rows", "8", "--max-test-rows", "4", "--base", str(tiny_base)]
    words += [word for name in strategies for word in ("--strategy", name)]
    words += ["--out", str(tmp_path / "cells"), "--work", str(tmp_path / "work"), "--train", '{"batch_size": 4}']
    statuses, output = run(words)
    assert [*statuses.values()] == ["done"] * 5 and "Suite 3" in output
