"""The cells of a benchmark by two processes of one thread each, against one such process.

    python -m benchmarks.fan_out

Each measurement runs `deal benchmark` in an empty home, once by itself and once twice at once with one folder of cells;
the variants take turns, so that whatever else the machine does falls on both. Run again with every cell stored, the
command shows what it takes without any cell: starting Python, Prefect's server and the base model. A tiny base model
and generated rows: it is the sharing that is measured, and a machine needs as many idle cores as there are processes.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from benchmarks.command_start import processor_seconds
from benchmarks.output import DEAL, write_result
from benchmarks.tiny_base import build_tiny_base

TASKS = {"colours": ("red", "green"), "sizes": ("large", "small"), "tastes": ("sweet", "sour")}
STRATEGIES = ("deal", "seq_lora", "ewc", "replay")
NUM_TEST_ROWS = 64


def write_tasks(folder: Path, num_rows: int) -> None:
    """Write tasks in the layout that `deal benchmark` reads."""
    folder.mkdir()
    tasks = {name: {"instruction": f"Which of the {name}?", "labels": labels} for name, labels in TASKS.items()}
    (folder / "tasks.json").write_text(json.dumps(tasks))
    for name, labels in TASKS.items():
        for part, count in (("train", num_rows), ("test", NUM_TEST_ROWS)):
            rows = [{"text": f"{part} {i} of {labels[i % 2]}", "label": labels[i % 2]} for i in range(count)]
            (folder / f"{name}.{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


class Used(NamedTuple):
    """What the commands took, from the start of the first to the end of the last."""

    seconds: float
    processor_seconds: float
    """Of all their processes, the Prefect servers included."""


def run_at_once(num_processes: int, folder: Path, options: list[str]) -> Used:
    """Run the command so many times at once."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PREFECT_API_URL", "DEAL_HOME")}
    environment |= {"OMP_NUM_THREADS": "1", "DEAL_CACHE_DIR": str(folder.parent / "cache")}
    command = [*DEAL, "benchmark", "--home", str(folder), "--json", *options]
    started, used = time.perf_counter(), processor_seconds()
    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for _ in range(num_processes)
    ]
    outputs = [process.communicate()[0] for process in processes]
    found = Used(time.perf_counter() - started, processor_seconds() - used)
    for process, output in zip(processes, outputs, strict=True):
        if process.returncode != 0:
            typer.echo(output.decode(errors="replace"), err=True)
            raise typer.Exit(1)
    return found


def measure(num_processes: int, folder: Path, options: list[str]) -> dict[str, float]:
    """What the command takes with every cell to do, and with none."""
    whole, start = run_at_once(num_processes, folder, options), run_at_once(num_processes, folder, options)
    return {
        "seconds": whole.seconds, "seconds_without_cells": start.seconds,
        "processor_seconds": whole.processor_seconds, "processor_seconds_without_cells": start.processor_seconds,
        "num_cells": len(list((folder / "benchmark").glob("*-*.json"))),
    }  # fmt: skip


def summarise(runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians, and the median of the ratios of measurements that stood side by side."""
    pairs = list(zip(runs["two"], runs["one"], strict=True))
    cells = {name: [run["seconds"] - run["seconds_without_cells"] for run in found] for name, found in runs.items()}
    work = {name: [run["processor_seconds"] - run["processor_seconds_without_cells"] for run in found]
            for name, found in runs.items()}  # fmt: skip
    return {
        "num_measurements": len(pairs),
        "median_seconds": {name: statistics.median(run["seconds"] for run in found) for name, found in runs.items()},
        "median_seconds_of_cells": {name: statistics.median(found) for name, found in cells.items()},
        "median_processor_seconds_of_cells": {name: statistics.median(found) for name, found in work.items()},
        "median_ratio": statistics.median(two["seconds"] / one["seconds"] for two, one in pairs),
        "median_ratio_of_cells": statistics.median(
            two / one for two, one in zip(cells["two"], cells["one"], strict=True)
        ),
    }


def main(
    measurements: Annotated[int, typer.Option(help="Measurements of each variant.")] = 5,
    rows: Annotated[int, typer.Option(help="Training rows per task.")] = 600,
    seeds: Annotated[int, typer.Option(help="Seeds; every strategy has a cell for each.")] = 2,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("benchmarks/results/fan_out.json"),
) -> None:
    """Print and write the seconds of one process and of two, and their ratio."""
    runs: dict[str, list[dict[str, float]]] = {"one": [], "two": []}
    with tempfile.TemporaryDirectory(prefix="deal-fan-out-") as work:
        base, data = Path(work) / "tiny-base", Path(work) / "data"
        base.mkdir()
        build_tiny_base(base)
        write_tasks(data, rows)
        options = ["--data", str(data), "--base", str(base), "--rows", str(rows)]
        options += [word for name in TASKS for word in ("--task", name)]
        options += [word for name in STRATEGIES for word in ("--strategy", name)]
        options += [word for seed in range(seeds) for word in ("--seed", str(seed))]
        for number in range(measurements):
            order = [("one", 1), ("two", 2)]
            for name, num_processes in order if number % 2 == 0 else reversed(order):
                runs[name].append(measure(num_processes, Path(work) / f"{name}-{number}", options))
    result = {"rows": rows, "seeds": seeds, "cores": os.cpu_count(), **summarise(runs), "measurements": runs}
    write_result(out, result)


if __name__ == "__main__":
    typer.run(main)
