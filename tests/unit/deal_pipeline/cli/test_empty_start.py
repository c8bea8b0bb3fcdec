"""Commands in an empty folder: each says in one line what to do first, and none leaves a file behind."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deal_pipeline.cli.app import app
from deal_pipeline.cli.session import FAILED, WRONG_USE
from tests.in_process import put_back

LEARN_FIRST = "Nothing is learned here yet; learn a file with: deal adapt --task NAME --data FILE"
ADD_FIRST = "deal lineage apply SPEC"
NEED_A_VERSION = (
    "version list",
    "version list --json",
    "version show 1",
    "version evaluate",
    "version promote 1",
    "version rollback",
    "version reject 1 --reason wrong",
    "version requeue",
    "version export 1 --format merged --out merged",
    "predict hello",
    "serve",
    "monitor",
    "rollout finish",
    "rollout abort",
    "feedback sample bank",
    "feedback add rows.csv",
    "feedback export bank",
    "task add-label bank loan",
    "task renew-tests bank",
    "version export 1 --format vllm --out adapters",
)
ANSWER = {
    "status": "Nothing is learned yet. Learn a file with: deal adapt",
    "ui": "Nothing is learned yet. Learn a file with: deal adapt",
    "lineage list": ADD_FIRST,
    "data list": "deal status",
    "data release --all": "Nothing is held.",
    "rollout status": "deal lineage apply",
    "server down": "Nothing was running.",
}
NEED_A_FILE = ("lineage show bank", "lineage pause bank", "lineage resume bank", "lineage delete bank")


@pytest.fixture(autouse=True)
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in. No variable names a home or a store."""
    folder = tmp_path / "work"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith(("DEAL_", "PREFECT_", "MLFLOW_TRACKING"))]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(folder)
    return folder


def run(line: str) -> tuple[int, str, str]:
    with put_back():
        done = CliRunner().invoke(app, shlex.split(line))
    assert "Traceback" not in done.output
    return done.exit_code, done.stdout, done.stderr


@pytest.mark.parametrize("line", NEED_A_VERSION)
def test_what_needs_a_version_says_how_to_get_one(empty: Path, line: str) -> None:
    code, out, err = run(line)
    told = json.loads(err)["error"] if "--json" in line else err.removeprefix("Error: ")
    assert (code, out) == (FAILED, "")
    assert told.startswith(LEARN_FIRST) and len(told.strip().splitlines()) == 1
    assert not list(empty.iterdir())


@pytest.mark.parametrize("line", ANSWER)
def test_what_looks_answers_and_leaves_nothing(empty: Path, line: str) -> None:
    code, out, _ = run(line)
    assert code == 0
    assert ANSWER[line] in out
    assert not list(empty.iterdir())


@pytest.mark.parametrize("line", NEED_A_FILE)
def test_what_needs_a_lineages_file_says_so(empty: Path, line: str) -> None:
    code, _, err = run(line)
    assert code == WRONG_USE
    assert "deal lineage" in err
    assert not list(empty.iterdir())


def test_a_store_elsewhere_still_gets_a_home_for_its_logs(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEAL_STORE_URI", str(empty / "store"))
    code, _, err = run("version list")
    assert code == FAILED and LEARN_FIRST in err
    assert (empty / "deal-home" / "logs" / "logging.yml").is_file()
