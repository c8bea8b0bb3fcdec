"""The processes that `deal server up` started: their record, how each starts and ends, and the supervisor.

HOME/stack.json records the processes. Each process writes its log to HOME/logs/. The supervisor is one of them:
`python -m deal_pipeline.server.local_processes HOME` restarts processes that died and shortens long logs.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil
from filelock import FileLock
from pydantic import BaseModel, Field, ValidationError

from deal_core.regular_file import complete_file
from infra.logs import cut_log, is_full, ready_log
from infra.settings import IMPATIENT, QUIET

STACK_FILE = "stack.json"
SUPERVISOR = "supervisor"
PART = "DEAL_PART"
"""Environment variable that tells of which part a process is: the part's log. What the part starts inherits it."""
STOP_SECONDS = 20.0
LOOK_SECONDS = 2.0
PAUSE_SECONDS = 20.0
"""Least time between two restarts of one process."""

logger = logging.getLogger("deal.supervisor")


class LocalProcess(BaseModel):
    """A process that `deal server up` started."""

    name: str
    command: tuple[str, ...]
    """Arguments of this Python."""
    pid: int
    log: Path
    """Path of its log."""
    gpus: str = ""
    """Its CUDA_VISIBLE_DEVICES; empty: those of `deal server up`."""

    @property
    def is_server(self) -> bool:
        """Whether the process is one of the two servers."""
        return self.name.endswith("-server")

    def is_alive(self) -> bool:
        """Whether the process still runs. Another process may have got its number."""
        with suppress(psutil.Error):
            return bool(psutil.Process(self.pid).environ().get(PART) == str(self.log))
        return False


class LocalStack(BaseModel):
    """All processes that `deal server up` started, and the addresses of the servers."""

    prefect_url: str
    mlflow_url: str
    backend_uri: str = Field(exclude=True)
    """Database of the MLflow server, with its password. Only the record contains it, and only the user can read that
    file."""
    artifact_uri: str
    """Where MLflow keeps files."""
    parts: list[LocalProcess] = []

    def is_alive(self) -> bool:
        """Whether any of the processes still runs."""
        return any(part.is_alive() for part in self.parts)

    def is_complete(self) -> bool:
        """Whether every process was started and still runs. The supervisor starts last."""
        return any(part.name == SUPERVISOR for part in self.parts) and all(part.is_alive() for part in self.parts)

    def environment(self) -> dict[str, str]:
        """Return the variables that make a command use these servers."""
        return {"PREFECT_API_URL": f"{self.prefect_url}/api", "MLFLOW_TRACKING_URI": self.mlflow_url}


def hold_stack(home: Path) -> FileLock:
    """Return the lock for starting and ending a home's processes. Its holder can take the lock again."""
    return FileLock(home / "stack.lock", is_singleton=True)


def read_stack(home: Path) -> LocalStack | None:
    """Read the record of a home; None if there is no record or it cannot be read."""
    try:
        return LocalStack.model_validate_json((home / STACK_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValidationError):
        return None


def start_part(home: Path, stack: LocalStack, name: str, command: tuple[str, ...], gpus: str = "") -> None:
    """Start a process and record it in place of an earlier process of the same name. The caller holds the stack.

    `gpus` is its CUDA_VISIBLE_DEVICES; empty: those of this process.

    Raises:
        OSError: The process cannot be started or recorded. If it cannot be recorded, it is killed.
    """
    log = ready_log(home / "logs" / f"{name}.log")
    if name.endswith("-server"):  # a child of a dead server may hold its port; a dead worker's training may go on
        _kill_all_of([log])
    environment = {**_environment(home, stack, name), PART: str(log)} | ({"CUDA_VISIBLE_DEVICES": gpus} if gpus else {})
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=home,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    part = LocalProcess(name=name, command=command, pid=process.pid, log=log, gpus=gpus)
    stack.parts = [*(other for other in stack.parts if other.name != name), part]
    try:
        with complete_file(home / STACK_FILE) as path:
            path.touch(mode=0o600)
            record = {**stack.model_dump(mode="json"), "backend_uri": stack.backend_uri}
            path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise


def _environment(home: Path, stack: LocalStack, name: str) -> dict[str, str]:
    """Return the user's environment with data in `home` and no telemetry."""
    local_name = stack.prefect_url.replace("127.0.0.1", "localhost")
    own = {
        **QUIET,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        "PREFECT_WORKER_QUERY_SECONDS": "2",  # the default, 10, is most of the time from a file's landing to its run
        "DEAL_S3_MAX_ATTEMPTS": "15",
        "PREFECT_LOGGING_EXTRA_LOGGERS": "flows,tasks,infra,deal_core",  # shows a run's log lines on its page
        "PREFECT_SERVER_UI_API_URL": f"{stack.prefect_url}/api",  # by default Prefect's pages use port 4200
        # Prefect's server asks for no password. Without the next two settings, any page in the user's browser could
        # start runs and so run commands. CORS hides the server's answers from other pages. CSRF protection refuses
        # their requests.
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"{stack.prefect_url},{local_name}",
        "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
        # removes old events, and old runs with their logs and artifacts; by default runs are never removed
        "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",
        # with leases in memory, a restart of the server would leave lineages locked without a holder
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    }
    dropped = {"PREFECT_API_URL", "PREFECT_LOGGING_SETTINGS_PATH", "PYTHONWARNINGS"}
    kept = {
        key: value for key, value in os.environ.items() if key not in dropped and (key, value) not in IMPATIENT.items()
    }
    servers = {} if name.endswith("-server") else stack.environment()
    if name == "mlflow-server":  # not as arguments: every user of the machine can read arguments
        servers = {"MLFLOW_BACKEND_STORE_URI": stack.backend_uri, "MLFLOW_ARTIFACTS_DESTINATION": stack.artifact_uri}
    return {**own, **kept, **servers, "PREFECT_HOME": str(home / "prefect"), "DEAL_HOME": str(home)}


def stop(home: Path) -> list[str]:
    """End the processes that were started in this home, and no others. Return the names of those that still ran.

    The supervisor ends first, then the workers, then the servers that the workers use.
    """
    if not home.is_dir():
        return []
    with hold_stack(home):
        stack = read_stack(home)
        if stack is None:
            return []
        ended = _end([part for part in stack.parts if part.name == SUPERVISOR])
        ended += _end([part for part in stack.parts if not part.is_server])
        ended += _end([part for part in stack.parts if part.is_server])
        (home / STACK_FILE).unlink(missing_ok=True)
        return ended


def _end(parts: Sequence[LocalProcess]) -> list[str]:
    """End parts and all that they have started, at the same time. Return the names of the parts that still ran."""
    alive = [part for part in parts if part.is_alive()]
    family: list[psutil.Process] = []
    for part in alive:
        with suppress(psutil.Error, ProcessLookupError):
            first = psutil.Process(part.pid)
            # the supervisor's children are parts that it started again, and each ends as a part
            family += [first, *([] if part.name == SUPERVISOR else first.children(recursive=True))]
            os.killpg(part.pid, signal.SIGTERM)
    psutil.wait_procs(family, timeout=STOP_SECONDS)
    # Kill what did not end, and runs that a killed worker has left: the next worker would start such a run again.
    _kill_all_of([part.log for part in parts])
    return [part.name for part in alive]


def _kill_all_of(logs: Sequence[Path]) -> None:
    """Kill the processes of the parts with these logs, and all that they have started."""
    wanted, killed = set(map(str, logs)), []
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # the process has ended, or is another user's
            if process.environ().get(PART) in wanted:
                process.kill()
                killed.append(process)
    psutil.wait_procs(killed, timeout=STOP_SECONDS)


def supervise(home: Path) -> None:
    """Restart processes that died and shorten long logs, until `deal server down` removes the record."""
    started: dict[str, float] = {}
    while True:
        try:
            with hold_stack(home):
                stack = read_stack(home)
                if stack is None:
                    return
                for part in stack.parts:
                    _look_after(home, stack, part, started)
        except OSError as error:  # such as a full disk: nobody restarts this process, so it tries again
            logger.error("The processes cannot be looked at: %s", error)
        time.sleep(LOOK_SECONDS)


def _look_after(home: Path, stack: LocalStack, part: LocalProcess, started: dict[str, float]) -> None:
    """Start a part again if it has died, and shorten its log if it is long. `started` has the last restarts."""
    is_recent = time.monotonic() - started.get(part.name, -PAUSE_SECONDS) < PAUSE_SECONDS
    if part.name != SUPERVISOR and not part.is_alive() and not is_recent:
        started[part.name] = time.monotonic()
        try:
            start_part(home, stack, part.name, part.command, part.gpus)
            logger.warning("%s had died and was started again", part.name)
        except OSError as error:
            logger.error("%s died and cannot be started: %s", part.name, error)
    if is_full(part.log):
        with suppress(OSError):  # if the disk has no room for the copy, try again later
            cut_log(part.log)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    supervise(Path(sys.argv[1]))
