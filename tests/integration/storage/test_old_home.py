"""Today's code opens a home of version 0.2.0, the first release; tests/data/README.md describes its origin."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import tarfile
from pathlib import Path
from typing import Any

import httpx
import mlflow
import pandas as pd
import pytest
from typer.testing import CliRunner

from benchmarks.speed.serving import served
from deal_core.errors import RegistryError
from flows.adapt import AdaptResult, adapt
from flows.champions import evaluate
from flows.cli.app import app
from flows.forget import forget
from flows.requeue import requeue
from infra.tracking.registry import open_registry
from tasks.context import current_store
from tasks.lineage.decisions import find_left_behind, promote_to, roll_back
from tasks.lineage.history import read_champion_at, read_history, read_moves
from tasks.lineage.tombstones import ForgottenRowsError
from tasks.predict import predict
from tasks.spec import AdaptSpec, parse
from tests.adapting import PASS
from tests.in_process import put_back

pytestmark = pytest.mark.usefixtures("prefect_api", "old_home")
ARCHIVE = Path(__file__).parents[2] / "data" / "old_home.tar.xz"
MADE_IN = "/tmp/deal-home-0.2"
LINEAGE = "desk"


@pytest.fixture
def old_home(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The unpacked home. The test runs in its parent folder, which has the base model and the rows."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    name_folder_in_database(home / "mlflow.db", MADE_IN, str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEAL_SERVING_PRECISION", "fp32")  # as the answers in the archive were given
    return home


def name_folder_in_database(path: Path, before: str, now: str) -> None:
    """Replace a folder wherever MLflow's database names it."""
    with sqlite3.connect(path) as database:
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for table in tables:
            for column in [row[1] for row in database.execute(f'PRAGMA table_info("{table}")')]:
                database.execute(
                    f'UPDATE "{table}" SET "{column}" = replace("{column}", ?, ?) WHERE instr("{column}", ?)',
                    (before, now, before),
                )
    database.close()


def learn(task: str) -> AdaptResult:
    """Adapt to a task's rows in the archive, with the settings of the home's versions."""
    values: dict[str, Any] = {
        "lineage": LINEAGE,
        "base_model": "base",
        "gate": PASS,
        "task": {"name": task, "data": f"data/{task}-train.jsonl", "test_data": f"data/{task}-test.jsonl"},
        "train": {"max_steps": 3, "max_prompt_tokens": 128, "max_answer_tokens": 12, "checkpoint_steps": 0},
        "data": {"retain_training_rows": True},
    }
    return asyncio.run(adapt(parse(AdaptSpec, values, "test")))


def command(*arguments: str, home: Path) -> Any:
    """The JSON output of a command."""
    with put_back():
        said = CliRunner().invoke(app, [*arguments, "--home", str(home), "--json"])
    assert said.exit_code == 0, said.output
    return json.loads(said.stdout)


def known_answers() -> tuple[list[str], dict[str, list[str]]]:
    """Texts, and the answers of each version when the home was made."""
    noted = json.loads(Path("answers.json").read_text(encoding="utf-8"))
    return noted["inputs"], noted["outputs"]


def test_history_and_predict(old_home: Path) -> None:
    entries = read_history(LINEAGE)
    assert [(entry.version, entry.task, entry.accepted, entry.parent_version) for entry in entries] == [
        ("1", "bank", True, None),
        ("2", "clinic", False, "1"),
        ("3", "parcels", True, "1"),
    ]
    assert "champion" in entries[2].aliases and entries[1].reasons and entries[2].average_accuracy is not None
    moves = read_moves(LINEAGE)
    assert [(move.action, move.version, move.who) for move in moves] == [
        ("promoted", "1", "gate"),
        ("promoted", "3", "gate"),
        ("rolled back", "1", "operator"),
        ("promoted", "3", "operator"),
    ]
    assert [read_champion_at(LINEAGE, move.when) for move in moves] == ["1", "3", "1", "3"]
    told = command("history", "--lineage", LINEAGE, home=old_home)
    assert [each["version"] for each in told] == ["1", "2", "3"]
    assert len(command("history", "--moves", "--lineage", LINEAGE, home=old_home)) == len(moves)

    text = known_answers()[0][0]
    answer = command("predict", text, "--lineage", LINEAGE, "--task", "bank", home=old_home)
    assert (answer["version"], answer["task"]) == ("3", "bank")
    logits = {
        version: predict(text, lineage=LINEAGE, task="bank", version=version).first_token_logits
        for version in ("1", "3")
    }
    assert logits["1"] != logits["3"] == answer["first_token_logits"]
    assert asyncio.run(evaluate(LINEAGE)).version == "3"


def test_adapt() -> None:
    assert learn("bank").status == "repeat", "rows that were learned before are known by their digest"
    learned = learn("clinic")
    assert (learned.status, learned.version, learned.parent_version) == ("promoted", "4", "3")


@pytest.mark.nightly
def test_rollback_and_promotion() -> None:
    assert learn("clinic").version == "4"
    assert predict("A broken wrist.", lineage=LINEAGE, task=None, version=None).task == "clinic"
    with pytest.raises(RegistryError, match="did not pass its gate"):
        promote_to(LINEAGE, "2", who="operator", why="test")
    roll_back(LINEAGE, "1", who="operator", why="test")
    assert [left.task for left in find_left_behind(LINEAGE)] == ["parcels", "clinic"]
    assert predict("I lost my card", lineage=LINEAGE, task=None, version=None).version == "1"
    promote_to(LINEAGE, "3", who="operator", why="test")
    champion = open_registry().champion(LINEAGE)
    assert champion is not None and champion.version == "3"
    assert [move.number for move in read_moves(LINEAGE)] == list(range(1, 8))
    roll_back(LINEAGE, "1", who="operator", why="test")
    (again,) = asyncio.run(requeue(LINEAGE, ["3"]))
    assert (again.status, again.version, again.parent_version) == ("promoted", "5", "1"), "its stored spec is read"


def test_forget(old_home: Path) -> None:
    bank = read_history(LINEAGE)[0]
    rows = [info.key for info in current_store().list(f"datasets/bank/{bank.dataset_sha256}")]
    assert any(key.endswith("train.parquet") for key in rows)
    plan = command("forget", bank.dataset_sha256[:12], "--dry-run", home=old_home)
    assert plan["task"] == "bank" and plan["unjudged"] == [LINEAGE]
    result = asyncio.run(forget(bank.dataset_sha256[:12], "asked for"))
    assert [each.version for each in result.plan.learned] == ["1", "2", "3"]
    assert not any(
        key.endswith(".parquet")
        for key in [info.key for info in current_store().list(f"datasets/bank/{bank.dataset_sha256}")]
    )
    with pytest.raises(ForgottenRowsError):
        learn("bank")
    assert predict("I lost my card", lineage=LINEAGE, task="bank", version=None).version == "3"


def test_mlflow_models_load(old_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{old_home / 'mlflow.db'}")
    texts, expected = known_answers()
    assert expected["1"] != expected["3"] != expected["2"], "the answers of the versions differ"
    table = pd.DataFrame({"input": texts, "task": "bank"})
    for name, version in (("1", "1"), ("2", "2"), ("3", "3")):
        answers = mlflow.pyfunc.load_model(f"models:/{LINEAGE}/{name}").predict(table)
        assert answers["output"].tolist() == expected[version]
        assert set(answers["version"]) == {version} and set(answers["lineage"]) == {LINEAGE}
    champion = mlflow.pyfunc.load_model(f"models:/{LINEAGE}@champion").predict(table[:1])
    assert champion["version"].tolist() == ["3"]


@pytest.mark.nightly
def test_serve() -> None:
    texts, expected = known_answers()
    rows = [{"input": text, "task": "bank"} for text in texts]
    with served(LINEAGE) as (url, _):
        response = httpx.post(f"{url}/invocations", json={"dataframe_records": rows}, timeout=300)
    assert response.status_code == 200 and response.headers["X-Deal-Version"] == "3"
    assert [each["output"] for each in response.json()["predictions"]] == expected["3"]
