"""Where an adaptation's time goes: stage by stage, and what share of it is neither training nor evaluation.

    python -m benchmarks.adaptation

`deal adapt` is run as a user runs it, twice in an empty home: a first task and a second one, of 600 rows each.
What no stage accounts for is the start of Python and of Prefect's server, and their end.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.output import DEAL, bare_environment, write_result
from benchmarks.tiny_base import EXAMPLES, NO_LIMITS
from deal_core.base_model.sources import DEFAULT_BASE

FILES = {"bank": "train.jsonl", "parcels": "messages.jsonl"}
LEARNING = ("train", "evaluate")


def write_task(name: str, num_rows: int, base: str, folder: Path) -> Path:
    """Write an example's rows, each as often as needed under a number of its own, and their spec."""
    rows = [json.loads(line) for line in (EXAMPLES / name / FILES[name]).read_text().splitlines()]
    with (folder / f"{name}.jsonl").open("w") as file:
        for number in range(num_rows):
            row = rows[number % len(rows)]
            file.write(json.dumps({"text": f"{number}. {row['text']}", "label": row["label"]}) + "\n")
    spec = folder / f"{name}.yaml"
    spec.write_text(json.dumps({  # JSON is YAML
        "schema_version": 1, "lineage": "parts", "base_model": base, "gate": NO_LIMITS,
        "task": {"name": name, "data": f"{name}.jsonl", "instruction": "What is the topic of the following message?"},
    }))  # fmt: skip
    return spec


def adapt(spec: Path, home: Path) -> dict[str, float]:
    """Seconds of each stage, and of the command that none accounts for."""
    started = time.perf_counter()
    done = subprocess.run(
        [*DEAL, "adapt", str(spec), "--home", str(home), "--json"], env=bare_environment(), check=True,
        stdout=subprocess.PIPE,
    )
    wall = time.perf_counter() - started
    seconds: dict[str, float] = json.loads(done.stdout)["seconds"]
    return {**seconds, "outside the stages": wall - sum(seconds.values())}


def summarise(runs: list[dict[str, float]]) -> dict[str, Any]:
    """Median seconds of each stage, and the median share outside of learning."""
    outside = [1 - sum(run[name] for name in LEARNING) / sum(run.values()) for run in runs]
    return {
        "median_seconds": {name: statistics.median(run[name] for run in runs) for name in runs[0]},
        "median_share_outside_training_and_evaluation": statistics.median(outside),
    }


def main(
    base: Annotated[str, typer.Option(help="Base model.")] = DEFAULT_BASE,
    rows: Annotated[int, typer.Option(help="Rows of each task, training and test.")] = 600,
    measurements: Annotated[int, typer.Option(help="Lineages of two tasks.")] = 3,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("benchmarks/results/adaptation.json"),
) -> None:
    """Print and write the stages of a first and of a second adaptation."""
    runs: dict[str, list[dict[str, float]]] = {"first": [], "second": []}
    with tempfile.TemporaryDirectory(prefix="deal-adaptation-") as work:
        specs = [write_task(name, rows, base, Path(work)) for name in FILES]
        for number in range(measurements):
            for place, spec in zip(runs, specs, strict=True):
                runs[place].append(adapt(spec, Path(work) / f"home-{number}"))
    adaptations = {place: summarise(found) for place, found in runs.items()}
    write_result(out, {"base": base, "num_rows": rows, "num_measurements": measurements, **adaptations})


if __name__ == "__main__":
    typer.run(main)
