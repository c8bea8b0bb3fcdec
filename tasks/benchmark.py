"""Run one cell of a benchmark, unless its result is stored or another process holds what it needs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from deal_core.benchmark.cell import Cell
from deal_core.benchmark.run import CellRun, run_cell
from deal_core.benchmark.suites import load_suite, with_prompts
from deal_core.method_config import MethodConfig
from deal_core.regular_file import complete_file
from tasks.base import lend_base
from tasks.progress import advance
from tasks.references import BaseRef

CellStatus = Literal["done", "stored", "busy"]


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
    work.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(work / f"{cell.digest()}.lock", timeout=0):
            if path.is_file():
                return "stored"
            report = advance("cell")
            result = run_cell(
                CellRun(
                    base=lend_base(base),
                    cell=cell,
                    tasks=with_prompts(load_suite(data, cell.tasks), cell.prompt),
                    method=method,
                    work=folder,
                    shared=work / "first-versions",
                    keep=keep and keep / path.stem,
                    on_progress=report,
                )
            )
            with complete_file(path) as part:
                part.write_text(json.dumps({"settings": cell.to_json(), **result}, indent=1) + "\n", encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)
            return "done"
    except Timeout:
        return "busy"
