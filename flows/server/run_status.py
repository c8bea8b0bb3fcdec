"""What `deal status` shows of the runs on a Prefect server, and whether there may be one. It imports no Prefect."""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from pydantic import BaseModel

NEWEST = 20
"""Runs of each kind, and files, that are shown."""


class RunStatus(BaseModel, frozen=True):
    """A run on the Prefect server."""

    name: str
    state: str
    since: datetime
    message: str
    run_id: str


class ServerRuns(BaseModel, frozen=True):
    """The runs on the Prefect server; without a server none."""

    url: str | None = None
    running: tuple[RunStatus, ...] = ()
    waiting: tuple[RunStatus, ...] = ()
    failed: tuple[RunStatus, ...] = ()
    """Failed runs of the last 24 hours, newest first."""


def may_name_a_server(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether anything may name a Prefect server: a variable, or a file that Prefect reads.

    Prefect itself says which server it is. It is asked only if this function returns True, or if it is imported anyway.
    """
    if "prefect" in sys.modules:
        return True
    if any(environment.get(name) for name in ("PREFECT_API_URL", "PREFECT_PROFILE", "PREFECT_PROFILES_PATH")):
        return True
    if any(Path(name).exists() for name in (".env", "prefect.toml")):
        return True
    try:
        if "prefect" in tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8")).get("tool", {}):
            return True
    except FileNotFoundError:
        pass
    except (OSError, ValueError):  # Prefect says what is wrong with it
        return True
    home = environment.get("PREFECT_HOME")
    return home is None or (Path(home).expanduser() / "profiles.toml").exists()
