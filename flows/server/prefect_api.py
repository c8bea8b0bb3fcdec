"""The Prefect API that an embedded command runs on: a process of its own, started before the flow, ended with it."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

COMMAND_PID = "DEAL_COMMAND_PID"
"""Tells the API's process which command it belongs to."""
MARK = b"prefect.server.api.server:create_app"


def start_api() -> None:
    """Start the API, unless PREFECT_API_URL names a server. It ends when this process does.

    Ctrl-C in a terminal goes to every process there. It shall reach the flow, which needs the API to end in order, so
    the API starts with that signal blocked.
    """
    from prefect.client.orchestration import get_client

    os.environ[COMMAND_PID] = str(os.getpid())
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        get_client(sync_client=True)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_orphans(home: Path, processes: Path = Path("/proc")) -> int:
    """End the APIs of this home whose command was killed before it could; return how many there were.

    Args:
        home: the home folder.
        processes: where the system lists its processes; nothing is done where it does not.
    """
    num_ended = 0
    for folder in processes.glob("[0-9]*"):
        with suppress(OSError, ValueError, IndexError):  # gone meanwhile, or somebody else's
            if MARK not in (folder / "cmdline").read_bytes():
                continue
            environment = dict(
                entry.split(b"=", 1) for entry in (folder / "environ").read_bytes().split(b"\0") if b"=" in entry
            )
            is_ours = environment.get(b"PREFECT_HOME") == os.fsencode(home / "prefect")
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            if is_ours and environment.get(COMMAND_PID.encode(), b"").decode() not in ("", parent):
                os.kill(int(folder.name), signal.SIGTERM)
                num_ended += 1
    return num_ended
