"""The local whole: a Prefect server, an MLflow server, pools, deployments, automations and workers on this machine.

What was started stands in HOME/stack.json; each process writes to HOME/logs/. Everything listens on loopback alone. One
more process, the keeper, starts again what dies.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
from filelock import FileLock
from pydantic import BaseModel, Field, ValidationError

from deal_core.errors import ConfigError, DealError
from flows.server.processes import StackProcess, end_parts, kill_left_by, kill_left_runs, start_of
from infra.logs import ready_log
from infra.settings import QUIET, TrackingSettings
from infra.store.base import complete_file

STACK_FILE = "stack.json"
KEEPER = "keeper"
GPU_POOL, CPU_POOL = "deal-gpu", "deal-cpu"
START_SECONDS = 180.0
LOOK_SECONDS = 0.3
Say = Callable[[str], None]


class StartError(DealError):
    """A part of the local whole did not come up."""


class Stack(BaseModel):
    """What runs, and where to look."""

    prefect_url: str
    mlflow_url: str
    backend_uri: str = Field(exclude=True)
    """Database of MLflow's server, its password included; kept in the record, which the user alone can read."""
    artifact_uri: str
    parts: list[StackProcess] = []

    def is_alive(self) -> bool:
        """Whether any of its processes still runs."""
        return any(part.is_alive() for part in self.parts)

    def is_complete(self) -> bool:
        """Whether every part was started; the keeper comes last."""
        return any(part.name == KEEPER for part in self.parts)

    def environment(self) -> dict[str, str]:
        """Variables that make a command use these servers."""
        return {"PREFECT_API_URL": f"{self.prefect_url}/api", "MLFLOW_TRACKING_URI": self.mlflow_url}


def hold_stack(home: Path) -> FileLock:
    """The lock of a home's record: whoever starts or ends parts has it. Its holder may take it again."""
    return FileLock(home / "stack.lock", is_singleton=True)


def read_stack(home: Path) -> Stack | None:
    """What was started in this home and not ended; None if nothing was, or its record cannot be read."""
    try:
        return Stack.model_validate_json((home / STACK_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValidationError):
        return None


def start_servers(home: Path, prefect_port: int, mlflow_port: int, say: Say) -> Stack:
    """Start both servers and wait until they answer.

    Raises:
        ConfigError: MLFLOW_TRACKING_URI names a server, or a port is taken.
        StartError: one of them ended, or does not answer in time; what was started is ended again.
    """
    settings = TrackingSettings()
    if settings.tracking_uri.startswith(("http://", "https://")):
        raise ConfigError("MLFLOW_TRACKING_URI names a server; deal up starts one of its own, so unset it.")
    for name, port in (("prefect", prefect_port), ("mlflow", mlflow_port)):
        if _is_taken(port):
            raise ConfigError(f"Something listens on port {port} already; give another with --{name}-port.")
    stack = Stack(
        prefect_url=f"http://127.0.0.1:{prefect_port}", mlflow_url=f"http://127.0.0.1:{mlflow_port}",
        backend_uri=settings.tracking_uri, artifact_uri=settings.artifact_uri,
    )  # fmt: skip
    try:
        for name, command in _server_commands(prefect_port, mlflow_port).items():
            say(f"{name} starts")
            start_part(home, stack, name, command)
        _wait_for_servers(stack)
    except BaseException:
        stop(home)
        raise
    return stack


def _server_commands(prefect_port: int, mlflow_port: int) -> dict[str, tuple[str, ...]]:
    return {
        "prefect-server": ("-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(prefect_port)),
        "mlflow-server": (
            "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(mlflow_port), "--workers", "1",
            "--uvicorn-opts=--no-access-log",  # a line for every request; who serves asks every two seconds
        ),
    }  # fmt: skip


def start_workers(home: Path, stack: Stack, num_trainings: int, say: Say) -> None:
    """Start a worker for each pool, and the keeper; `num_trainings` lineages may learn at once."""
    for pool, limit in {GPU_POOL: num_trainings, CPU_POOL: 3}.items():
        name = f"worker-{pool}"
        say(f"{name} starts")
        command = ("-m", "prefect", "worker", "start", "--pool", pool, "--name", name, "--limit", str(limit))
        start_part(home, stack, name, (*command, "--no-create-pool-if-not-found"))
    start_part(home, stack, KEEPER, ("-m", "flows.server.supervisor", str(home)))


def heal(home: Path, stack: Stack, say: Say) -> None:
    """Start those parts of a stack again that do not run, and wait for the servers.

    Raises:
        ConfigError: all of them run.
        StartError: one of them does not come up.
    """
    dead = [part for part in stack.parts if not part.is_alive()]
    if not dead:
        raise ConfigError(
            f"It is up already: Prefect at {stack.prefect_url}, MLflow at {stack.mlflow_url}. End it with: deal down"
        )
    for part in dead:
        say(f"{part.name} starts again")
        if part.is_server:
            kill_left_by(part, home)
        start_part(home, stack, part.name, part.command)
    _wait_for_servers(stack)


def stop(home: Path) -> list[str]:
    """End what was started in this home and nothing else; return the names of what was ended.

    The keeper first, then what asks the servers, then these: each kind at once, since some take their time.
    """
    with hold_stack(home):
        stack = read_stack(home)
        if stack is None:
            return []
        servers = [part for part in stack.parts if part.is_server]
        ended = end_parts(part for part in stack.parts if part.name == KEEPER)
        ended += end_parts(part for part in stack.parts if not part.is_server)
        ended += end_parts(servers)
        for part in servers:
            kill_left_by(part, home)
        kill_left_runs(home)
        (home / STACK_FILE).unlink(missing_ok=True)
        return ended


def start_part(home: Path, stack: Stack, name: str, command: tuple[str, ...]) -> None:
    """Start a process, and write it into the stack's record in place of one of its name; hold the stack meanwhile.

    Raises:
        OSError: it cannot be started, or not recorded; then it is ended again.
    """
    log = ready_log(home / "logs" / f"{name}.log")
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=home, env=_environment(home, stack, name), stdin=subprocess.DEVNULL,
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    part = StackProcess(name=name, command=command, pid=process.pid, started=start_of(process.pid), log=log)
    stack.parts = [*(other for other in stack.parts if other.name != name), part]
    try:
        _record(home, stack)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise


def _record(home: Path, stack: Stack) -> None:
    with complete_file(home / STACK_FILE) as path:
        path.touch(mode=0o600)
        record = {**stack.model_dump(mode="json"), "backend_uri": stack.backend_uri}
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _environment(home: Path, stack: Stack, name: str) -> dict[str, str]:
    """The user's environment, with the servers' data in `home` and nothing sent to anybody."""
    local_name = stack.prefect_url.replace("127.0.0.1", "localhost")
    own = {
        **QUIET,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        "PREFECT_WORKER_QUERY_SECONDS": "2",  # the default, 10, is most of what passes between a landing and its run
        "DEAL_S3_MAX_ATTEMPTS": "15",
        "PREFECT_LOGGING_EXTRA_LOGGERS": "flows,tasks,infra,deal_core",  # what a run says shows on its page
        "PREFECT_SERVER_UI_API_URL": f"{stack.prefect_url}/api",  # else its page asks port 4200
        # It asks for no password. Without these two, every page that the user's browser has open could start runs, and
        # with them any command: the first keeps answers from it, the second refuses what it sends without asking first.
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"{stack.prefect_url},{local_name}",
        "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
        # runs with their logs and artifacts as well as events; by default they would be kept for ever
        "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",
        # in memory a restart of the server would leave lineages held by nobody
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    }
    dropped = {"PREFECT_API_URL", "PREFECT_LOGGING_SETTINGS_PATH", "PYTHONWARNINGS"}
    kept = {key: value for key, value in os.environ.items() if key not in dropped}
    servers = {} if name.endswith("-server") else stack.environment()
    if name == "mlflow-server":  # not as arguments, which everybody on the machine can read
        servers = {"MLFLOW_BACKEND_STORE_URI": stack.backend_uri, "MLFLOW_ARTIFACTS_DESTINATION": stack.artifact_uri}
    return {**own, **kept, **servers, "PREFECT_HOME": str(home / "prefect"), "DEAL_HOME": str(home)}


def _wait_for_servers(stack: Stack) -> None:
    _wait(stack, lambda: _answers(f"{stack.prefect_url}/api/health"), "prefect-server")
    _wait(stack, lambda: _answers(f"{stack.mlflow_url}/health"), "mlflow-server")


def _wait(stack: Stack, check: Callable[[], bool], name: str) -> None:
    part = next(part for part in stack.parts if part.name == name)
    waited = 0.0
    while not check() or not part.is_alive():
        if not part.is_alive():
            raise StartError(f"{name} ended before it answered; the end of {part.log} says why.")
        if waited > START_SECONDS:
            raise StartError(f"{name} did not answer within {START_SECONDS:.0f} s; {part.log} may say why.")
        time.sleep(LOOK_SECONDS)
        waited += LOOK_SECONDS


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).is_success
    except httpx.HTTPError:
        return False
