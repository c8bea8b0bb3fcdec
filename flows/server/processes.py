"""Processes of the local whole: told from others that got their number, and ended with all that they started."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil
from pydantic import BaseModel

STOP_SECONDS = 20.0


class StackProcess(BaseModel):
    """A process that `deal up` started."""

    name: str
    command: tuple[str, ...]
    """Arguments of this Python."""
    pid: int
    started: str
    """What `start_of` said of it, so that another process with its number is never taken for it."""
    log: Path

    @property
    def is_server(self) -> bool:
        """Whether it is one of the two servers."""
        return self.name.endswith("-server")

    def is_alive(self) -> bool:
        """Whether the process still runs."""
        return self.started != "" and start_of(self.pid) == self.started


def start_of(pid: int) -> str:
    """The boot of the machine, and the clock ticks from there to a process's start; empty if it does not run.

    The time of day would not do: psutil's create_time() moves when the clock is set.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # the name before may have spaces
    except OSError:
        return ""
    state, ticks = fields[0], fields[19]  # the third and the twenty-second of man 5 proc_pid_stat
    return "" if state in "ZX" else f"{boot}+{ticks}"


def end_parts(parts: Iterable[StackProcess]) -> list[str]:
    """End parts and the processes that they started; return the names of those that were still there."""
    alive = [part for part in parts if part.is_alive()]
    family: list[psutil.Process] = []
    for part in alive:
        with suppress(psutil.Error):
            first = psutil.Process(part.pid)
            family += [first, *first.children(recursive=True)]
    for part in alive:
        with suppress(ProcessLookupError):
            os.killpg(part.pid, signal.SIGTERM)
    _, left = psutil.wait_procs(family, timeout=STOP_SECONDS)
    for process in left:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(left, timeout=STOP_SECONDS)
    return [part.name for part in alive]


def kill_left_by(server: StackProcess, home: Path) -> None:
    """Kill what a server that is dead has left of its process group: a child of it may hold the port.

    The group's number may be somebody else's by now, so that only processes that were started for this home go.
    """
    if start_of(server.pid):  # a stranger has the number, which no process gets while there is a group of that number
        return
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == server.pid and _is_of(home, process):
                process.kill()
                process.wait(STOP_SECONDS)


def kill_left_runs(home: Path) -> None:
    """Kill runs of this home whose worker was killed: they live on, and would be started a second time."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if _is_of(home, process) and "PREFECT__FLOW_RUN_ID" in process.environ():
                process.kill()
                process.wait(STOP_SECONDS)


def _is_of(home: Path, process: psutil.Process) -> bool:
    return bool(process.environ().get("PREFECT_HOME") == str(home / "prefect"))
