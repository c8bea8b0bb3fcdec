"""What the benchmarks share: the command under test, and where figures go."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

DEAL = (sys.executable, "-c", "from flows.cli import main; main()")
"""`deal` without being installed: what this checkout says."""


def write_result(out: Path, result: Mapping[str, Any]) -> None:
    """Print a result with what it was measured on, and write it as JSON."""
    text = json.dumps({**result, "machine": describe_machine()}, indent=1)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text + "\n")
    typer.echo(text)


def describe_machine() -> dict[str, Any]:
    """Cores, what of the processor decides how fast bf16 is, and the libraries that compute."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.is_file() else []
    return {
        "cores": os.cpu_count(),
        "bf16_instructions": [name for name in ("avx512_bf16", "amx_bf16") if name in flags],
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")},
    }
