"""The `deal` command of this checkout, started as a separate process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.printed import command_of, require_described

ROOT = Path(__file__).parents[2]
DEAL = (sys.executable, "-c", "from flows.cli.app import main; main()")


def deal(home: Path, *arguments: str, expect: int = 0) -> Any:
    """Run a command in a home, on the base models that this machine has, and give what it prints as JSON."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name == "DEAL_CACHE_DIR" or not name.startswith(("DEAL_", "PREFECT_", "MLFLOW_"))
    }
    done = subprocess.run(
        [*DEAL, *arguments, "--home", str(home), "--json"],
        cwd=home.parent,
        env={**kept, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == expect, done.stdout + done.stderr
    printed = json.loads(done.stdout)
    require_described(command_of(arguments), printed)
    return printed
