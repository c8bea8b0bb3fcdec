"""What `deal` commands take: their start, an adaptation by stage and by launch, and cells by two processes.

    python -m benchmarks.speed.commands start
    python -m benchmarks.speed.commands adaptation
    python -m benchmarks.speed.commands launches
    python -m benchmarks.speed.commands cells

start: `deal --help`, `deal version list` and `deal status` of a long lineage, and the imports of `deal predict`. The
figures are processor time, which other processes change less than the wall time. The commands take turns. Python alone,
which imports nothing, is the floor below all. No command that reads imports MLflow; its import is measured to compare.
The import of PEFT, which imports torch and transformers, is the floor below `deal predict`.

adaptation: `deal adapt` is run twice in an empty home: a first task and a second one, of 600 rows each. What no stage
accounts for is the start of Python and of Prefect's server, and their end.

launches: `deal adapt` of one task in an empty home, by one process and by two that each launch starts. They take turns.
Base model and rows are tiny: the start of the processes is measured. It needs the extra `ray`.

cells: `benchmarks.compare`, once alone and once twice at once with one folder of cells. The variants take turns. Run
again with every cell stored, the command shows what it takes without any cell: starting Python and the base model. Base
model and rows are tiny: the sharing is measured. A machine needs as many idle cores as there are processes.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from benchmarks.output import DEAL, RESULTS, Base, Out, bare_environment, write_result
from benchmarks.tiny_base import EXAMPLES, NO_LIMITS, build_tiny_base
from benchmarks.tiny_tasks import COLOURS_AND_SIZES, write_tasks
from deal_core.base_model.sources import DEFAULT_BASE
from infra.store.keys import version_key
from infra.store.local import FileStore
from infra.versions import Version

LINEAGE = "long"
VERSION = Version(
    lineage=LINEAGE,
    run_key="key",
    task="billing",
    strategy="deal",
    base_sha256="b" * 64,
    dataset_sha256="d" * 64,
    landed_sha256="e" * 64,
    config_sha256="c" * 64,
    adapter_uri="adapters/long/key",
    adapter_sha256="a" * 64,
    files_sha256={"adapter_config.json": ("f" * 64,), "adapter_model.safetensors": ("e" * 64,)},
    parent_version=None,
    accepted=True,
    train_seconds=60.0,
    average_accuracy=0.75,
    forgetting=0.01,
    backward_transfer=-0.01,
    forward_transfer=0.1,
    accuracies={"billing": 0.75},
)
COMMANDS = {
    "python": [sys.executable, "-c", ""],
    "import_mlflow": [sys.executable, "-c", "import mlflow"],
    "import_peft": [sys.executable, "-c", "import peft"],
    "import_predict": [sys.executable, "-c", "import tasks.predict"],
    "help": [*DEAL, "--help"],
    "history": [*DEAL, "version", "list", "--lineage", LINEAGE],
    "status": [*DEAL, "status"],
}
FILES = {"bank": "train.jsonl", "parcels": "messages.jsonl"}
"""The tasks that are adapted to, and their rows in EXAMPLES."""
LEARNING = ("train", "evaluate")
LAUNCHES = {"one": ("local", 1), "local": ("local", 2), "torchrun": ("torchrun", 2), "ray": ("ray", 2)}
"""DEAL_LAUNCH and the number of processes."""
CELL_TASKS = {**COLOURS_AND_SIZES, "tastes": ("sweet", "sour")}
CELL_STRATEGIES = ("deal", "seq_lora", "replay")
NUM_TEST_ROWS = 64

app = typer.Typer(help=__doc__, rich_markup_mode=None)


def processor_seconds() -> float:
    """The processor time of all processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def make_lineage(home: Path, num_versions: int) -> None:
    """Store versions that differ in number alone. None is champion, so no adapter is looked at."""
    store = FileStore(home / "store")
    for number in range(1, num_versions + 1):
        parent = str(number - 1) if number > 1 else None
        changes = {"version": str(number), "run_key": f"key-{number}", "parent_version": parent}
        content = VERSION.model_copy(update=changes).model_dump_json(indent=1)
        store.put_bytes(version_key(LINEAGE, number), content.encode())


@app.command()
def start(
    versions: Annotated[int, typer.Option(help="Versions of the lineage.")] = 1000,
    measurements: Annotated[int, typer.Option(help="Measurements of each command.")] = 11,
    out: Out = RESULTS / "command_start.json",
) -> None:
    """The processor time of each command, median and slowest."""
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory(prefix="deal-start-") as work:
        home = Path(work) / "home"
        make_lineage(home, versions)
        environment = bare_environment() | {"DEAL_HOME": str(home)}
        for number in range(measurements + 1):
            for name, command in COMMANDS.items():
                before = processor_seconds()
                subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
                if number:  # the first reads the files from the disk
                    seconds[name].append(processor_seconds() - before)
    write_result(
        out,
        {
            "num_versions": versions,
            "num_measurements": measurements,
            "median_processor_seconds": {name: median(measured) for name, measured in seconds.items()},
            "slowest_processor_seconds": {name: max(measured) for name, measured in seconds.items()},
        },
    )


def write_spec(name: str, num_rows: int, base: str, folder: Path, **train: int) -> Path:
    """Write an example's rows, each as often as needed under a number of its own, and their spec."""
    rows = [json.loads(line) for line in (EXAMPLES / name / FILES[name]).read_text().splitlines()]
    with (folder / f"{name}.jsonl").open("w") as file:
        for number in range(num_rows):
            row = rows[number % len(rows)]
            file.write(json.dumps({"text": f"{number}. {row['text']}", "label": row["label"]}) + "\n")
    spec = folder / f"{name}.yaml"
    spec.write_text(
        json.dumps(
            {  # JSON is YAML
                "schema_version": 1,
                "lineage": "parts",
                "base_model": base,
                "gate": NO_LIMITS,
                "train": train,
                "task": {
                    "name": name,
                    "data": f"{name}.jsonl",
                    "instruction": "What is the topic of the following message?",
                },
            }
        )
    )
    return spec


def adapt(spec: Path, home: Path, **environment: str) -> dict[str, float]:
    """Seconds of each stage, and of the command that none accounts for."""
    command = [*DEAL, "adapt", str(spec), "--home", str(home), "--json"]
    started = time.perf_counter()
    done = subprocess.run(command, env=bare_environment() | environment, check=True, stdout=subprocess.PIPE)
    wall = time.perf_counter() - started
    seconds: dict[str, float] = json.loads(done.stdout)["seconds"]
    return {**seconds, "outside the stages": wall - sum(seconds.values())}


def medians_of_stages(runs: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Median seconds of each stage, and the median share outside of learning."""
    outside = [1 - sum(run[name] for name in LEARNING) / sum(run.values()) for run in runs]
    return {
        "median_seconds": {name: median(run[name] for run in runs) for name in runs[0]},
        "median_share_outside_training_and_evaluation": median(outside),
    }


@app.command()
def adaptation(
    base: Base = DEFAULT_BASE,
    rows: Annotated[int, typer.Option(help="Rows of each task, training and test.")] = 600,
    measurements: Annotated[int, typer.Option(help="Lineages of two tasks.")] = 3,
    out: Out = RESULTS / "adaptation.json",
) -> None:
    """The stages of a first and of a second adaptation."""
    runs: dict[str, list[dict[str, float]]] = {"first": [], "second": []}
    with tempfile.TemporaryDirectory(prefix="deal-adaptation-") as work:
        specs = [write_spec(name, rows, base, Path(work)) for name in FILES]
        for number in range(measurements):
            for place, spec in zip(runs, specs, strict=True):
                runs[place].append(adapt(spec, Path(work) / f"home-{number}"))
    adaptations = {place: medians_of_stages(of_place) for place, of_place in runs.items()}
    write_result(out, {"base": base, "num_rows": rows, "num_measurements": measurements, **adaptations})


@app.command()
def launches(
    rows: Annotated[int, typer.Option(help="Rows of the task, training and test.")] = 600,
    measurements: Annotated[int, typer.Option(help="Measurements of each launch.")] = 3,
    out: Out = RESULTS / "launches.json",
) -> None:
    """The seconds of training and evaluation, and the median ratio to one process's in the same round."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in LAUNCHES}
    with tempfile.TemporaryDirectory(prefix="deal-launches-") as work:
        base = Path(work) / "tiny-base"
        build_tiny_base(base)
        for number in range(measurements):
            for name in LAUNCHES if number % 2 == 0 else reversed(LAUNCHES):
                launch, num_processes = LAUNCHES[name]
                spec = write_spec("parcels", rows, str(base), Path(work), num_processes=num_processes)
                stages = adapt(spec, Path(work) / f"{name}-{number}", DEAL_LAUNCH=launch)
                runs[name].append({stage: stages[stage] for stage in LEARNING})
    write_result(
        out,
        {
            "num_rows": rows,
            "num_measurements": measurements,
            "variants": {
                name: {
                    "median_seconds": {stage: median(run[stage] for run in of_launch) for stage in LEARNING},
                    "median_ratio": median(
                        sum(run.values()) / sum(one.values()) for run, one in zip(of_launch, runs["one"], strict=True)
                    ),
                }
                for name, of_launch in runs.items()
            },
            "measurements": runs,
        },
    )


def run_at_once(num_processes: int, folder: Path, options: Sequence[str]) -> tuple[float, float]:
    """Run `benchmarks.compare` so many times at once.

    Returns:
        The seconds from the start of the first to the end of the last, and the processor time of all their processes.
    """
    environment = bare_environment() | {"OMP_NUM_THREADS": "1", "DEAL_CACHE_DIR": str(folder.parent / "cache")}
    folders = ["--out", str(folder / "cells"), "--work", str(folder / "work")]
    command = [sys.executable, "-m", "benchmarks.compare", *folders, *options]
    started, used = time.perf_counter(), processor_seconds()
    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for _ in range(num_processes)
    ]
    outputs = [process.communicate()[0] for process in processes]
    took = time.perf_counter() - started, processor_seconds() - used
    for process, output in zip(processes, outputs, strict=True):
        if process.returncode != 0:
            typer.echo(output.decode(errors="replace"), err=True)
            raise typer.Exit(1)
    return took


def measure_cells(num_processes: int, folder: Path, options: Sequence[str]) -> dict[str, float]:
    """What the command takes with every cell to do, and with none."""
    whole, without = run_at_once(num_processes, folder, options), run_at_once(num_processes, folder, options)
    return {
        "seconds": whole[0],
        "seconds_without_cells": without[0],
        "processor_seconds": whole[1],
        "processor_seconds_without_cells": without[1],
        "num_cells": len(list((folder / "cells").glob("*-*.json"))),
    }


@app.command()
def cells(
    measurements: Annotated[int, typer.Option(help="Measurements of each variant.")] = 5,
    rows: Annotated[int, typer.Option(help="Training rows per task.")] = 600,
    seeds: Annotated[int, typer.Option(help="Seeds; every strategy has a cell for each.")] = 2,
    out: Out = RESULTS / "fan_out.json",
) -> None:
    """The seconds of one process and of two, and the median ratio of measurements that stood side by side."""
    runs: dict[str, list[dict[str, float]]] = {"one": [], "two": []}
    with tempfile.TemporaryDirectory(prefix="deal-fan-out-") as work:
        base = Path(work) / "tiny-base"
        build_tiny_base(base)
        data = write_tasks(Path(work), CELL_TASKS, num_train=rows, num_test=NUM_TEST_ROWS)
        options = ["--data", str(data), "--base", str(base), "--rows", str(rows)]
        options += [word for name in CELL_TASKS for word in ("--task", name)]
        options += [word for name in CELL_STRATEGIES for word in ("--strategy", name)]
        options += [word for seed in range(seeds) for word in ("--seed", str(seed))]
        for number in range(measurements):
            order = [("one", 1), ("two", 2)]
            for name, num_processes in order if number % 2 == 0 else reversed(order):
                runs[name].append(measure_cells(num_processes, Path(work) / f"{name}-{number}", options))
    of_cells, work_of_cells = (
        {name: [run[figure] - run[f"{figure}_without_cells"] for run in of_name] for name, of_name in runs.items()}
        for figure in ("seconds", "processor_seconds")
    )
    write_result(
        out,
        {
            "rows": rows,
            "seeds": seeds,
            "cores": os.cpu_count(),
            "num_measurements": measurements,
            "median_seconds": {name: median(run["seconds"] for run in of_name) for name, of_name in runs.items()},
            "median_seconds_of_cells": {name: median(values) for name, values in of_cells.items()},
            "median_processor_seconds_of_cells": {name: median(values) for name, values in work_of_cells.items()},
            "median_ratio": median(
                two["seconds"] / one["seconds"] for one, two in zip(runs["one"], runs["two"], strict=True)
            ),
            "median_ratio_of_cells": median(
                two / one for one, two in zip(of_cells["one"], of_cells["two"], strict=True)
            ),
            "measurements": runs,
        },
    )


if __name__ == "__main__":
    app()
