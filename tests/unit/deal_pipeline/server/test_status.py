"""`deal status`: its lines about the inbox, and where a Prefect server may be named, so that Prefect must be asked."""

from __future__ import annotations

import asyncio
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from filelock import FileLock
from typer.testing import CliRunner

import deal_pipeline.server.status
from deal_pipeline.cli.app import app
from deal_pipeline.server.status import _unusable_files, may_name_a_server, read_status
from infra.lineage_state import LineageState
from infra.run_journal import Run, RunJournal
from infra.store.base import ObjectStore
from infra.store.opening import open_store, store_at
from tasks.context import lineage_lock
from tasks.inbox import look
from tests.in_process import put_back
from tests.stored_versions import move, store_version


def test_files_that_lie_where_no_watch_looks_are_told_of(tmp_path: Path) -> None:
    store = store_at(str(tmp_path))
    store.put_bytes("inbox/bill/task.yaml", b"test_data: held/out.csv\n")
    for key in ("may.csv", "bill/held/may.csv", "bill/may.csv", "bill/held/out.csv", "bill/.tmp/x.csv"):
        store.put_bytes(f"inbox/{key}", b"text,label\na,b\n")
    assert [info.key for info in look(store).arrivals] == ["inbox/bill/may.csv"]
    deep, shallow = _unusable_files(store, look(store))
    assert deep.startswith(f"'inbox/bill/held/may.csv' in {store.uri} is skipped: it is in a folder with the task's")
    assert deep.endswith("move it to a folder of its own.")
    assert shallow.endswith("is skipped: it is not in a task's folder; move it to inbox/TASK/may.csv.")
    for number in range(100):
        store.put_bytes(f"inbox/{number}.csv", b"x")
    assert _unusable_files(store, look(store))[20:] == ["82 more files in the inbox are skipped."]


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An environment in which nothing names a server, and a folder without Prefect's files as the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "prefect", raising=False)
    return {"PREFECT_HOME": str(tmp_path / "prefect"), "PREFECT_LOGGING_SETTINGS_PATH": "logging.yml"}


def test_without_a_variable_and_a_file_there_is_no_server(bare: dict[str, str]) -> None:
    assert not may_name_a_server(bare)
    Path("pyproject.toml").write_text('[project]\nname = "mine"\ndependencies = ["prefect"]\n')
    assert not may_name_a_server(bare)


@pytest.mark.parametrize("name", ["PREFECT_API_URL", "PREFECT_PROFILE", "PREFECT_PROFILES_PATH"])
def test_a_variable_may_name_a_server(bare: dict[str, str], name: str) -> None:
    assert may_name_a_server({**bare, name: "something"})
    assert not may_name_a_server({**bare, name: ""})


@pytest.mark.parametrize(
    ("file", "text"),
    [
        (".env", "PREFECT_API_URL=http://127.0.0.1:4200/api"),
        ("prefect.toml", ""),
        ("pyproject.toml", '[tool.prefect]\napi.url = "http://127.0.0.1:4200/api"\n'),
        ("pyproject.toml", "damaged ["),
        ("prefect/profiles.toml", 'active = "mine"\n'),
    ],
)
def test_a_file_that_prefect_reads_may_name_a_server(bare: dict[str, str], file: str, text: str) -> None:
    Path(file).parent.mkdir(exist_ok=True)
    Path(file).write_text(text)
    assert may_name_a_server(bare)


def test_prefects_own_home_is_not_looked_into(bare: dict[str, str]) -> None:
    del bare["PREFECT_HOME"]
    assert may_name_a_server(bare)


def test_prefect_is_asked_where_it_is_imported_anyway(bare: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prefect", sys)
    assert may_name_a_server(bare)


def test_a_fault_of_one_lineage_is_shown_and_the_others_too(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store()
    for name, text in (("good", "{}"), ("odd", "{}"), ("wait", "retrain: {min_rows: 9, max_wait_days: 3000000}")):
        store.put_bytes(f"lineages/{name}.yaml", text.encode())
    store.put_bytes("inbox/bank/a.jsonl", b'{"text": "a", "label": "b"}\n')
    read_state = deal_pipeline.server.status.read_state

    def fail(store: ObjectStore, lineage: str) -> LineageState:
        if lineage == "odd":
            raise OverflowError("date value out of range")
        return read_state(store, lineage)

    monkeypatch.setattr(deal_pipeline.server.status, "read_state", fail)
    status = asyncio.run(read_status(home))
    assert {each.lineage: each.num_open for each in status.lineages} == {"good": 1, "odd": None}
    assert status.damaged == ("Lineage odd: OverflowError: date value out of range",)
    (problem,) = status.problems
    assert problem.startswith("Lineage wait is left out") and "max_wait_days is 3000000" in problem


def test_what_mlflow_lacks_is_said_in_one_line_and_by_name(home: Path) -> None:
    store = open_store()
    store_version(store, {})
    move(store, "1")
    waiting = {lineage.lineage: lineage.mlflow_waiting for lineage in asyncio.run(read_status(home)).lineages}
    assert waiting == {"l": ("version 1", "report 1", "move 1")}
    with put_back():
        said = CliRunner().invoke(app, ["status", "--home", str(home)]).stdout
    assert "l: MLflow lacks 3 entries; the next run or deal server sync writes what is missing" in " ".join(
        said.split()
    )


def test_a_run_of_a_command_is_shown_without_a_server_while_it_works(home: Path) -> None:
    started = datetime(2030, 1, 1, 12, tzinfo=UTC)
    run = Run(
        lineage="l",
        task="bank",
        run_key="a" * 64,
        dataset_uri="datasets/bank",
        dataset_sha256="d" * 64,
        num_rows={"train": 102, "test": 20, "rejected": 0},
        base_sha256="b" * 64,
        parent_version=None,
        params={},
        started=started,
    )

    def shown() -> str | None:
        return next(lineage.run for lineage in asyncio.run(read_status(home)).lineages if lineage.lineage == "l")

    lineage_lock("l").parent.mkdir()
    with FileLock(lineage_lock("l")):
        assert shown() == "a run works on it", "the lineage has no version yet"
        RunJournal(open_store()).start(run)
        assert shown() == "a run learns bank (102 training rows) since 2030-01-01 12:00 UTC"
        with put_back():
            said = CliRunner().invoke(app, ["status", "--home", str(home)]).stdout
        assert "l: a run learns bank (102 training rows)" in said
    store_version(open_store(), {})
    assert shown() is None, "the run was killed"
