"""The `deal` command of this checkout, started as a separate process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.output import bare_environment
from tests.printed import command_of, require_described

ROOT = Path(__file__).parents[2]
DEAL = (sys.executable, "-c", "from deal_pipeline.cli.app import main; main()")


def environment(**more: str) -> dict[str, str]:
    """What a command gets: the base models that this machine has, no home and no server but those of `more`."""
    models = {name: os.environ[name] for name in ("DEAL_CACHE_DIR",) if name in os.environ}
    return {**bare_environment(), **models, "PYTHONPATH": str(ROOT), **more}


def command(home: Path, *arguments: str) -> list[str]:
    """The words of a command in a home that prints JSON."""
    return [*DEAL, *arguments, "--home", str(home), "--json"]


def deal(home: Path, *arguments: str, expect: int | Sequence[int] = 0, **more: str) -> Any:
    """Run a command in a home, with `more` in its environment, and give what it prints as JSON.

    `expect` is its exit code, or those that it may have.
    """
    done = subprocess.run(
        command(home, *arguments),
        cwd=home.parent,
        env=environment(**more),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in ((expect,) if isinstance(expect, int) else expect), done.stdout + done.stderr
    printed = json.loads(done.stdout)
    require_described(command_of(arguments), printed)
    return printed
