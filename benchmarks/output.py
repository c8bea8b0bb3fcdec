"""What the benchmarks share: the command under test, processes of their own, and where figures and pages go."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from deal_core.base_model.device import bf16_instructions, cpu_info

DEAL = (sys.executable, "-c", "from deal_pipeline.cli.app import main; main()")
"""`deal` without being installed: what this checkout says."""
RESULTS = Path("benchmarks/results")

Base = Annotated[str, typer.Option(help="Base model.")]
Out = Annotated[Path, typer.Option(help="Where the figures go.")]
Result = TypeVar("Result")


def alone(function: Callable[..., Result], *values: object) -> Result:
    """Call a function in a process of its own, whose memory and threads nothing else has used."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *values).result()


def peak_bytes() -> int:
    """The largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def bare_environment() -> dict[str, str]:
    """The environment without what points this project's commands at a home or at servers."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("DEAL_", "PREFECT_", "MLFLOW_"))}


def describe_machine() -> dict[str, Any]:
    """Return the facts that decide rounding and speed: processor, cores, bf16 instructions, GPU, libraries."""
    return {
        "cpu": cpu_info("model name"),
        "cores": os.cpu_count(),
        "bf16_instructions": list(bf16_instructions()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "peft")},
    }


def write_result(out: Path, result: Mapping[str, Any]) -> None:
    """Print a result with what it was measured on, and write it as JSON."""
    text = json.dumps({**result, "machine": describe_machine()}, indent=1)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text + "\n")
    typer.echo(text)


def templates() -> Environment:
    """The templates of the pages that benchmarks write. A value that is missing is an error."""
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )


def read(path: Path) -> Any:
    """Read a result.

    Raises:
        typer.BadParameter: It is not there.
    """
    if not path.is_file():
        raise typer.BadParameter(f"{path} is not there; run the benchmark that writes it first.")
    return json.loads(path.read_text())
