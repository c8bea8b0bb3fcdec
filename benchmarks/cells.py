"""Cells with the settings that the comparisons of methods share, and the run of one cell."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from benchmarks.continual.cell import Cell, make_cell
from benchmarks.continual.run import CellRun, run_cell
from benchmarks.continual.suites import Part, digest_of, load_suite, with_prompts
from deal_core.config import AdapterConfig, TrainConfig
from deal_core.method_config import MethodConfig
from deal_core.regular_file import complete_file
from tasks.base import cached_base
from tasks.references import BaseRef

CellStatus = Literal["done", "stored", "busy"]


def benchmark_cell(
    strategy: str,
    method: MethodConfig,
    tasks: tuple[str, ...],
    *,
    base: BaseRef,
    data: Path,
    seed: int,
    rows: int,
    part: Part = "dev",
    **fields: Any,
) -> Cell:
    """Return a cell whose answer is the likeliest label, scored right after a task was learned and in the end.

    Args:
        strategy: Name of the strategy.
        method: Its settings.
        tasks: The tasks, in the order in which they are learned.
        base: The base model.
        data: Folder of the tasks.
        seed: Seed of the cell.
        rows: Training rows per task.
        part: The test rows that are scored: dev to choose settings, reported for what a page claims.
        fields: Further fields of the cell.
    """
    return make_cell(
        strategy,
        tasks,
        method=method,
        seed=seed,
        train=TrainConfig(max_prompt_tokens=160, checkpoint_steps=0, seed=seed),
        rows=rows,
        part=part,
        max_test_rows=None,
        scored="ends",
        scoring="likeliest",
        adapter=AdapterConfig(),
        base=f"{base.name} {base.sha256}",
        data=digest_of(load_suite(data, tasks)),
        **fields,
    )


def make_cell_file(
    base: BaseRef, cell: Cell, method: MethodConfig, data: Path, out: Path, work: Path, keep: Path | None = None
) -> CellStatus:
    """Run a cell and store its figures as one JSON file in the folder `out`.

    The cell records those settings of `method` that its strategy reads. The folder `data` has the tasks, and `work` the
    checkpoints and locks. Processes that share cells share `work`. In `keep`, the cell's versions stay in a folder of
    the cell's name.

    Returns:
        "busy": another process runs the cell, or makes the first version that this cell shares with another one.
    """
    path, folder = out / cell.file_name, work / cell.digest()
    for place in (out, work):
        place.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(work / f"{cell.digest()}.lock", timeout=0):
            if path.is_file():
                return "stored"
            result = run_cell(
                CellRun(
                    base=cached_base(base),
                    cell=cell,
                    tasks=with_prompts(load_suite(data, cell.tasks), cell.prompt),
                    method=method,
                    work=folder,
                    shared=work / "first-versions",
                    keep=keep and keep / path.stem,
                )
            )
            with complete_file(path) as part:
                part.write_text(json.dumps({"settings": cell.to_json(), **result}, indent=1) + "\n", encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)
            return "done"
    except Timeout:
        return "busy"
