"""Lineages from Python: every call is a command of its own, and the caller's process stays as it was."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from prefect.settings import get_current_settings

from deal_core.yaml_file import read_yaml
from deal_pipeline import CommandError, Lineage, command
from tests.adapting import PASS
from tests.printed import command_of, require_described

SETTINGS = {"train": {"max_steps": 3, "max_prompt_tokens": 96, "checkpoint_steps": 0}, "gate": PASS}
COLOURS = pd.DataFrame(
    [{"text": f"Number {number} is {colour}.", "label": colour} for number in range(15) for colour in ("red", "green")]
)


@pytest.fixture(autouse=True)
def json_of_the_commands_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare what the commands print with the reference: they run in processes of their own."""
    run = command.run_command

    def run_checked(arguments: Sequence[str], *others: Any) -> Any:
        printed = run(arguments, *others)
        require_described(command_of(arguments), printed)
        return printed

    monkeypatch.setattr("deal_pipeline.lineage.run_command", run_checked)


@pytest.fixture
def with_server(prefect_api: None) -> dict[str, str]:
    """The tests' Prefect server: an API of a command's own takes as long to start as all else."""
    return {"PREFECT_API_URL": str(get_current_settings().api.url)}


@pytest.mark.nightly
def test_a_table_is_learned_and_answered_from_a_running_event_loop(
    with_server: dict[str, str], home: Path, tiny_base: Path
) -> None:
    before, shown = dict(os.environ), list[str]()

    async def work() -> None:
        with Lineage("api", home=home, show=shown.append, environment=with_server) as lineage:
            first = lineage.adapt(COLOURS, task="colours", base=str(tiny_base), settings=SETTINGS)
            assert first.accepted and first.version == "1"
            assert first.metrics == {"colours": "exact"} and 0 <= first.scores["colours"] <= 1
            wrong = {"train": {"no_such_setting": 1}}
            with pytest.raises(CommandError, match="no_such_setting"):
                lineage.adapt(COLOURS.to_dict("records"), task="colours", settings=wrong)
            assert len(list((home / "tables").iterdir())) == 1, "the refused call's table is removed"
            answers = lineage.predict(["Number 3 is red.", "Number 4 is green."], task="colours")
            assert len(answers) == 2 and all(isinstance(answer, str) for answer in answers)
            assert lineage.predict("Number 3 is red.", task="colours") == answers[:1]
            with pytest.raises(CommandError, match="this version knows colours"):
                lineage.predict("Number 3 is red.", task="sizes")

    asyncio.run(work())
    assert dict(os.environ) == before
    assert any(line.startswith("train") for line in shown), "every stage is told"


def test_settings_reach_the_command_whatever_characters_they_hold(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels, read = ["\U0001f600 good", "bad\u2028", "caf\u00e9"], list[Any]()

    def stop(arguments: Sequence[str], *_: object) -> None:
        read.append(read_yaml(Path(arguments[1])))
        raise CommandError("seen", 1)

    monkeypatch.setattr("deal_pipeline.lineage.run_command", stop)
    with pytest.raises(CommandError, match="seen"):
        Lineage("api", home=home).adapt(tmp_path / "a.csv", task={"name": "mood", "labels": labels})
    assert read[0]["task"]["labels"] == labels


def test_every_message_was_shown_when_the_result_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "import sys; [print('{\"said\": \"line\"}', file=sys.stderr) for _ in range(100)]; print('[1]')"
    monkeypatch.setattr(command, "COMMAND", (sys.executable, "-c", said))
    shown: list[str] = []

    def show(line: str) -> None:
        time.sleep(0.005)
        shown.append(line)

    assert command.run_command([], {}, show) == [1]
    assert shown == ["line"] * 100


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (pd.DataFrame({"text": ["a", "b"], "label": [1, "x"]}), "label"),
        (pd.DataFrame([["a", "b"]], columns=["text", "text"]), "Duplicate column names"),
        ({"train": None, "test": None}, "is a dict of train, test; give one split of it"),
    ],
)
def test_a_table_that_parquet_cannot_hold_is_an_error_of_the_project(table: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=said):
        Lineage(home=tmp_path).adapt(table, task="t")
    assert not list(tmp_path.rglob("*.parquet"))


def test_a_relative_file_of_test_rows_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    specs: list[dict[str, Any]] = []

    def run(arguments: Sequence[str], *_: object) -> Any:
        specs.append(json.loads(Path(arguments[1]).read_text()))
        raise CommandError("enough", 1)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("deal_pipeline.lineage.run_command", run)
    with pytest.raises(CommandError, match="enough"):
        Lineage(home=tmp_path).adapt("a.csv", task={"name": "t", "test_data": Path("test.csv")})
    assert specs[0]["task"]["test_data"] == str(tmp_path / "test.csv")
