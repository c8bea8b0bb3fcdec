"""What the start of a command costs: `deal --help`, `deal history` and `deal status` of a long lineage, `deal predict`.

    python -m benchmarks.command_start

The figures are processor time, which other processes change less than the wall time. The commands take turns. Python
alone, which imports nothing, is the floor below all. MLflow's import is what a registry on a server costs more. Of
`deal predict` only the imports are measured, without the model's load; the import of PEFT, which imports torch and
transformers, is the floor below them.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.output import DEAL, bare_environment, write_result
from infra.settings import TrackingSettings
from infra.tracking.facts import VersionFacts
from infra.tracking.registry import Registry
from infra.tracking.tracker import open_tracker

LINEAGE = "long"
FACTS = VersionFacts(
    run_key="key", task="billing", strategy="deal", base_sha256="b" * 64, dataset_sha256="d" * 64,
    config_sha256="c" * 64, adapter_uri="adapters/long/key", adapter_sha256="a" * 64, parent_version=None,
    accepted=True, reasons=(), average_accuracy=0.75, forgetting=0.01, backward_transfer=-0.01, forward_transfer=0.1,
)  # fmt: skip


def make_lineage(home: Path, num_versions: int) -> None:
    """Register versions that differ in number alone, in an SQLite registry."""
    settings = TrackingSettings(
        home=home, tracking_uri=f"sqlite:///{home}/mlflow.db", artifact_uri=(home / "mlflow-artifacts").as_uri()
    )
    adapter = home / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text('{"r": 16}')
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    registry, tracker = Registry(settings), open_tracker(settings)
    with tracker.start(LINEAGE, FACTS.run_key, name="billing") as run:
        model_id = run.log_adapter(adapter, FACTS.task, sha256=FACTS.adapter_sha256)
        for number in range(num_versions):
            facts = replace(FACTS, run_key=f"key-{number}", parent_version=str(number) if number else None)
            registry.register(LINEAGE, facts, tracking_id=run.run_id, model_id=model_id)


def processor_seconds() -> float:
    """The processor time of all processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def seconds_of(command: list[str], home: Path) -> float:
    """Run a command in a process of its own, and return the processor time that it took."""
    before = processor_seconds()
    subprocess.run(command, env=bare_environment() | {"DEAL_HOME": str(home)}, check=True, stdout=subprocess.DEVNULL)
    return processor_seconds() - before


def main(
    versions: Annotated[int, typer.Option(help="Versions of the lineage.")] = 1000,
    measurements: Annotated[int, typer.Option(help="Measurements of each command.")] = 11,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("benchmarks/results/command_start.json"),
) -> None:
    """Print and write the median processor time of each command."""
    commands = {
        "python": [sys.executable, "-c", ""],
        "import_mlflow": [sys.executable, "-c", "import mlflow"],
        "import_peft": [sys.executable, "-c", "import peft"],
        "import_predict": [sys.executable, "-c", "import tasks.predict"],
        "help": [*DEAL, "--help"],
        "history": [*DEAL, "history", "--lineage", LINEAGE],
        "status": [*DEAL, "status"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    with tempfile.TemporaryDirectory(prefix="deal-start-") as work:
        home = Path(work) / "home"
        make_lineage(home, versions)
        for number in range(measurements + 1):
            for name, command in commands.items():
                taken = seconds_of(command, home)
                if number:  # the first reads the files from the disk
                    seconds[name].append(taken)
    write_result(out, {
        "num_versions": versions, "num_measurements": measurements,
        "median_processor_seconds": {name: statistics.median(found) for name, found in seconds.items()},
        "slowest_processor_seconds": {name: max(found) for name, found in seconds.items()},
    })  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
