"""The processes of `deal server up`: their record, how they start and end, and the runs of earlier workers."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
import tenacity
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.settings.models.server.services import ServerServicesDBVacuumSettings
from prefect.states import Running

from deal_core.errors import ConfigError
from deal_pipeline.server import local_stack
from deal_pipeline.server.deploy import GPU_POOL
from deal_pipeline.server.embedded import DatabaseError, enter_home
from deal_pipeline.server.local_processes import (
    PART,
    SUPERVISOR,
    LocalProcess,
    LocalStack,
    _environment,
    _look_after,
    hold_stack,
    read_stack,
    start_part,
    stop,
    supervise,
)
from deal_pipeline.server.local_stack import _restart_left_runs, bring_up, share_gpus, start_servers, start_workers
from infra.settings import IMPATIENT, TrackingSettings
from tests.in_process import put_back
from tests.loopback import free_port

SLEEP = ("-c", "import time; time.sleep(600)")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DEAL_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


def stack() -> LocalStack:
    return LocalStack(
        prefect_url="http://127.0.0.1:1",
        mlflow_url="http://127.0.0.1:2",
        backend_uri="postgresql://me:secret@db/mlflow",
        artifact_uri="file:///a",
    )


def test_a_taken_port_is_refused_before_anything_starts(home: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(ConfigError, match="--mlflow-port"):
            start_servers(home, free_port(), other.getsockname()[1], print)
    assert read_stack(home) is None


def test_a_damaged_database_is_named_before_anything_starts(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a part was started")

    (home / "prefect.db").write_bytes(b"no database " * 1000)
    monkeypatch.setenv("PREFECT_API_DATABASE_CONNECTION_URL", f"sqlite+aiosqlite:///{home}/prefect.db")
    monkeypatch.setattr(local_stack, "start_part", refuse)
    with pytest.raises(DatabaseError):
        start_servers(home, free_port(), free_port(), print)


def test_a_command_asks_the_server_whose_database_the_environment_names(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = stack()
    start_part(home, made, "worker", SLEEP)
    try:
        other = f"sqlite:///{Path.cwd()}/other.db"
        for named, used in ((made.backend_uri, made.mlflow_url), ("sqlite:///other.db", other)):
            with put_back():
                monkeypatch.setenv("MLFLOW_TRACKING_URI", named)
                enter_home(home)
                assert TrackingSettings().tracking_uri == used
    finally:
        stop(home)


def test_up_after_a_start_that_did_not_end_starts_on_the_same_database(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = stack()
    start_part(home, made, "mlflow-server", SLEEP)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", made.mlflow_url)  # as a command sets it while a part runs
    with socket.create_server(("127.0.0.1", 0)) as other:
        up = bring_up(home, prefect_port=free_port(), mlflow_port=other.getsockname()[1], num_trainings=1, say=print)
        with pytest.raises(ConfigError, match="--mlflow-port"):
            asyncio.run(up)
    assert TrackingSettings().tracking_uri == made.backend_uri
    assert read_stack(home) is None


@pytest.mark.parametrize(
    ("gpus", "num_trainings", "shares"),
    [
        ([], 3, [("", 3)]),
        (["0", "1"], 1, [("0,1", 1)]),
        (["0", "1"], 2, [("0", 1), ("1", 1)]),
        (["4", "5", "7"], 2, [("4,7", 1), ("5", 1)]),
        (["0", "1"], 5, [("0", 3), ("1", 2)]),
    ],
)
def test_trainings_share_a_gpu_only_if_there_are_more_of_them(
    gpus: list[str], num_trainings: int, shares: list[tuple[str, int]]
) -> None:
    assert share_gpus(gpus, num_trainings) == shares


def test_each_gpu_worker_starts_with_its_gpus_and_its_limit(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    monkeypatch.setattr(local_stack, "start_part", lambda _home, _stack, *part: started.append(part))
    monkeypatch.setattr("deal_core.base_model.device.visible_gpus", lambda: ["4", "5"])
    start_workers(home, stack(), 3, print)
    own = [(command[command.index("--limit") + 1], *gpus) for name, command, *gpus in started if GPU_POOL in name]
    assert own == [("2", "4"), ("1", "5")]


def test_a_worker_keeps_its_gpus_when_it_is_started_again(home: Path) -> None:
    made = stack()
    start_part(home, made, "worker", SLEEP, "4,7")
    try:
        (first,) = made.parts
        os.kill(first.pid, signal.SIGKILL)
        os.waitpid(first.pid, 0)
        _look_after(home, made, first, {})
        recorded = read_stack(home)
        assert recorded is not None
        (again,) = recorded.parts
        assert again.pid != first.pid and psutil.Process(again.pid).environ()["CUDA_VISIBLE_DEVICES"] == "4,7"
    finally:
        stop(home)


def test_the_databases_password_is_in_the_users_own_record_alone(home: Path) -> None:
    made = stack()
    start_part(home, made, "x", SLEEP)
    try:
        record = home / "stack.json"
        assert record.stat().st_mode & 0o077 == 0
        assert read_stack(home) == made
        assert "secret" not in made.model_dump_json()
        assert "secret" not in " ".join(psutil.Process(made.parts[0].pid).cmdline())
    finally:
        stop(home)


def test_stop_ends_what_was_started_and_runs_whose_worker_is_gone_and_nothing_else(home: Path) -> None:
    made = stack()
    start_part(home, made, "worker", SLEEP)
    # as runs have it from their workers, one of them in another home
    left, other = (
        subprocess.Popen([sys.executable, *SLEEP], env={**os.environ, PART: str(log)})
        for log in (made.parts[0].log, "/elsewhere/logs/worker.log")
    )
    try:
        assert stop(home) == ["worker"]
        assert not psutil.pid_exists(left.pid) and other.poll() is None
        assert stop(home) == [] and read_stack(home) is None
    finally:
        left.kill()
        other.kill()
        left.wait()
        other.wait()


NOTES = (
    "-c",
    """import signal, sys, time
def end(*_):
    with open("ended", "a") as file:
        print(sys.argv[1], file=file)
    sys.exit()
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
time.sleep(600)""",
)
"""A process that notes its name in the home folder when it is asked to end."""


def test_what_the_supervisor_started_again_ends_as_everything_else(home: Path) -> None:
    made = stack()
    for name in ("prefect-server", "worker"):
        start_part(home, made, name, (*NOTES, name))
    first = {part.name: part.pid for part in made.parts}
    for attempt in tenacity.Retrying(wait=tenacity.wait_fixed(0.1), stop=tenacity.stop_after_delay(120)):
        with attempt:  # the second "ready" of a log is then that of the process that was started again
            assert all(part.log.read_text() == "ready\n" for part in made.parts)
    start_part(home, made, SUPERVISOR, ("-m", "deal_pipeline.server.local_processes", str(home)))
    try:
        for pid in first.values():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        for attempt in tenacity.Retrying(wait=tenacity.wait_fixed(0.1), stop=tenacity.stop_after_delay(120)):
            with attempt:
                again = read_stack(home)
                assert again is not None
                assert all(part.is_alive() and part.pid != first.get(part.name) for part in again.parts)
                assert all(part.log.read_text().count("ready\n") == 2 for part in again.parts if part.name in first)
        supervisor = psutil.Process(next(part.pid for part in again.parts if part.name == SUPERVISOR))
        assert len(supervisor.children()) == 2
        assert stop(home) == [SUPERVISOR, "worker", "prefect-server"]
        assert (home / "ended").read_text().split() == ["worker", "prefect-server"]
    finally:
        stop(home)


def test_another_process_with_a_parts_number_is_not_taken_for_it(tmp_path: Path) -> None:
    assert not LocalProcess(name="x", command=(), pid=os.getpid(), log=tmp_path).is_alive()


def test_a_process_that_has_ended_is_not_alive_before_it_is_waited_for(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, *SLEEP], env={**os.environ, PART: str(tmp_path)})
    part = LocalProcess(name="x", command=(), pid=process.pid, log=tmp_path)
    while not part.is_alive():  # its variables can be read a moment after the program is loaded
        assert process.poll() is None
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not part.is_alive()
    process.wait()
    assert not part.is_alive()


PARENT = ("-c", f"import subprocess, sys, time; subprocess.Popen([sys.executable, *{SLEEP}]); time.sleep(600)")


@pytest.mark.parametrize("then", ["deal server down", "supervisor"])
def test_what_a_killed_server_leaves_behind_does_not_keep_its_port(
    home: Path, monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    made = stack()
    start_part(home, made, "mlflow-server", PARENT)
    server = psutil.Process(made.parts[0].pid)
    while not (children := server.children()):
        assert server.is_running()
    server.kill()
    server.wait()
    try:
        if then == "supervisor":
            monkeypatch.setattr("deal_pipeline.server.local_processes.LOOK_SECONDS", 0.01)
            threading.Thread(target=supervise, args=(home,), daemon=True).start()
            for attempt in tenacity.Retrying(wait=tenacity.wait_fixed(0.01), stop=tenacity.stop_after_delay(60)):
                with attempt:
                    again = read_stack(home)
                    assert again is not None and again.is_alive()
        else:
            assert stop(home) == []
        assert not children[0].is_running()
        running = read_stack(home)
        assert (running is not None and running.is_alive()) == (then != "deal server down")
    finally:
        stop(home)


def test_a_process_that_cannot_be_recorded_is_ended(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*paths: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("deal_core.regular_file.os.replace", full)
    with pytest.raises(OSError, match="No space"):
        start_part(home, stack(), "worker", SLEEP)
    monkeypatch.undo()
    mine = [each for each in psutil.process_iter() if f"DEAL_HOME={home}" in environment_of(each)]
    assert mine == [] and read_stack(home) is None


def environment_of(process: psutil.Process) -> list[str]:
    try:
        return [f"{name}={value}" for name, value in process.environ().items()]
    except psutil.Error:
        return []


def test_a_stop_waits_for_a_start_that_is_under_way(home: Path) -> None:
    made = stack()
    ended: list[str] = []
    stopping = threading.Thread(target=lambda: ended.extend(stop(home)))
    with hold_stack(home):
        stopping.start()
        start_part(home, made, "worker", SLEEP)
        stopping.join(0.3)
        assert stopping.is_alive() and made.is_alive()
        with hold_stack(home):
            assert made.is_alive(), "its holder may take it again"
    stopping.join()
    assert ended == ["worker"]


def test_other_pages_of_a_browser_cannot_command_the_server(home: Path) -> None:
    environment = _environment(home, stack(), "prefect-server")
    assert environment["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"] == "http://127.0.0.1:1,http://localhost:1"
    assert environment["PREFECT_SERVER_CSRF_PROTECTION_ENABLED"] == "true"


def test_workers_are_more_patient_than_commands(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in IMPATIENT.items():
        monkeypatch.setenv(name, value)
    assert not _environment(home, stack(), "deal-gpu").keys() & IMPATIENT.keys()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "9")
    assert _environment(home, stack(), "deal-gpu")["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "9"


def test_the_server_removes_old_runs(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in _environment(home, stack(), "prefect-server").items():
        monkeypatch.setenv(name, value)
    assert {"events", "flow_runs"} <= ServerServicesDBVacuumSettings().enabled_vacuum_types


def test_the_supervisor_cuts_a_log_that_is_written_to(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deal_pipeline.server.local_processes.LOOK_SECONDS", 0.01)
    monkeypatch.setattr("infra.logs.MAX_BYTES", 3)
    log = home / "x.log"
    made = stack()
    made.parts = [LocalProcess(name=SUPERVISOR, command=(), pid=os.getpid(), log=log)]
    (home / "stack.json").write_text(json.dumps({**made.model_dump(mode="json"), "backend_uri": ""}))
    supervising = threading.Thread(target=supervise, args=(home,), daemon=True)
    with log.open("ab", buffering=0) as output:
        output.write(b"first")
        supervising.start()
        for attempt in tenacity.Retrying(wait=tenacity.wait_fixed(0.01), stop=tenacity.stop_after_delay(60)):
            with attempt:
                assert log.stat().st_size == 0
        (home / "stack.json").unlink()
        supervising.join()
        output.write(b"second")
    assert (log.read_bytes(), (home / "x.log.1").read_bytes()) == (b"second", b"first")


def test_a_start_is_complete_with_all_its_processes_and_is_not_made_twice(home: Path) -> None:
    made = stack()
    start_part(home, made, "worker", SLEEP)
    try:
        assert not made.is_complete()
        start_part(home, made, SUPERVISOR, SLEEP)
        assert made.is_complete()
        with pytest.raises(ConfigError, match="deal server down"):
            asyncio.run(bring_up(home, prefect_port=1, mlflow_port=2, num_trainings=1, say=print))
        os.kill(made.parts[0].pid, signal.SIGKILL)
        os.waitpid(made.parts[0].pid, 0)
        assert not made.is_complete()
    finally:
        stop(home)
    assert json.loads(made.model_dump_json())["parts"][0]["name"] == "worker"


@pytest.mark.usefixtures("prefect_api")
def test_only_runs_that_may_be_done_twice_start_again() -> None:
    async def states() -> dict[str, StateType]:
        found = {}
        async with get_client() as client:
            runs = {}
            for name in ("adapt-file", "adapt", "rollback"):
                flow = await client.create_flow_from_name(name)
                deployment = await client.create_deployment(flow, name, tags=["deal"])
                runs[name] = (await client.create_flow_run_from_deployment(deployment)).id
                await client.set_flow_run_state(runs[name], Running(), force=True)
            await _restart_left_runs(client)
            for name, run in runs.items():
                state = (await client.read_flow_run(run)).state
                assert state and state.message and state.message.startswith("Its worker was ended")
                found[name] = state.type
        return found

    crashed = {"adapt": StateType.CRASHED, "rollback": StateType.CRASHED}  # the sensor follows `adapt` by another run
    assert asyncio.run(states()) == {"adapt-file": StateType.SCHEDULED, **crashed}
