"""The local whole's record, and what keeps it from taking somebody else's servers or processes for its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from deal_core.errors import ConfigError
from flows.stack import KEEPER, Part, Stack, heal, read_stack, start_part, start_servers, stop

SLEEP = ("-c", "import time; time.sleep(600)")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DEAL_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


def stack() -> Stack:
    return Stack(
        prefect_url="http://127.0.0.1:1", mlflow_url="http://127.0.0.1:2", backend_uri="postgresql://me:secret@db/mlflow",
        artifact_uri="file:///a",
    )  # fmt: skip


def test_a_taken_port_is_refused_before_anything_starts(home: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(ConfigError, match="--mlflow-port"):
            start_servers(home, free_port(), other.getsockname()[1], print)
    assert read_stack(home) is None


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


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
    environment = {**os.environ, "PREFECT__FLOW_RUN_ID": "1"}
    left = subprocess.Popen([sys.executable, *SLEEP], env={**environment, "PREFECT_HOME": str(home / "prefect")})
    other = subprocess.Popen([sys.executable, *SLEEP], env={**environment, "PREFECT_HOME": "/elsewhere"})
    try:
        assert stop(home) == ["worker"]
        assert not psutil.pid_exists(left.pid) and other.poll() is None
        assert stop(home) == [] and read_stack(home) is None
    finally:
        left.kill()
        other.kill()
        left.wait()
        other.wait()


def test_another_process_with_a_parts_number_is_not_taken_for_it(tmp_path: Path) -> None:
    mine = psutil.Process()
    part = Part(name="x", command=(), pid=mine.pid, created=mine.create_time(), log=tmp_path)
    assert part.is_alive()
    assert not part.model_copy(update={"created": part.created - 1}).is_alive()


def test_a_start_that_was_cut_short_is_not_complete_and_a_whole_one_is_not_healed(home: Path) -> None:
    made = stack()
    start_part(home, made, "worker", SLEEP)
    try:
        assert not made.is_complete()
        start_part(home, made, KEEPER, SLEEP)
        assert made.is_complete()
        with pytest.raises(ConfigError, match="deal down"):
            heal(home, made, print)
    finally:
        stop(home)
    assert json.loads(made.model_dump_json())["parts"][0]["name"] == "worker"
