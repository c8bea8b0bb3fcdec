"""The frame of a command: its common options, what is printed of its result, and the exit code."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import pytest
import typer
from pydantic import BaseModel
from typer.testing import CliRunner

from flows.cli.console import Screen
from flows.cli.session import CommandResult, Session, command
from tests.in_process import put_back


class Found(BaseModel):
    """A result."""

    number: int


@pytest.fixture
def app(home: Path) -> typer.Typer:
    group = typer.Typer()

    @command(group, "looking")
    def look(
        deal: Session, number: Annotated[int, typer.Option("--number")], failed: bool = False, rejected: bool = False
    ) -> CommandResult:
        """Look for a number."""
        found = Found(number=number)
        return CommandResult([found, found], [f"Found {number} in {deal.home}."], failed=failed, rejected=rejected)

    @command(group, name="say")
    def say_nothing(deal: Session) -> None:
        deal.show(CommandResult({"said": deal.screen.as_json}, ["said"]))

    return group


def test_a_command_gets_the_session_and_its_own_options(app: typer.Typer, tmp_path: Path) -> None:
    other = tmp_path / "other"
    with put_back():
        done = CliRunner().invoke(app, ["look", "--home", str(other), "--number", "7"])
        assert (done.exit_code, done.stdout) == (0, f"Found 7 in {other}.\n")
        done = CliRunner().invoke(app, ["look", "--number", "7", "--json"])
        assert json.loads(done.stdout) == [{"number": 7}, {"number": 7}]


@pytest.mark.parametrize(
    ("options", "code"),
    [((), 0), (("--failed",), 1), (("--rejected",), 3), (("--failed", "--rejected"), 1)],
)
def test_the_result_is_printed_and_sets_the_exit_code(app: typer.Typer, options: tuple[str, ...], code: int) -> None:
    with put_back():
        done = CliRunner().invoke(app, ["look", "--number", "7", *options])
    assert done.exit_code == code and "Found 7" in done.stdout


def test_a_command_without_a_result_prints_for_itself(app: typer.Typer) -> None:
    with put_back():
        assert CliRunner().invoke(app, ["say"]).stdout == "said\n"
        assert json.loads(CliRunner().invoke(app, ["say", "--json"]).stdout) == {"said": True}


@pytest.mark.parametrize(
    ("trains", "is_up", "imports"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_what_trains_is_imported_while_the_api_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trains: bool, is_up: bool, imports: bool
) -> None:
    """The import is made to fail. An API that is up leaves nothing to wait for."""

    async def flow() -> str:
        return "learned"

    api = SimpleNamespace(done=lambda: is_up, result=lambda: None)
    monkeypatch.setattr("flows.server.embedded.start_api", lambda: api)
    monkeypatch.setitem(sys.modules, "deal_core.training.train", None)
    session = Session(home=tmp_path, screen=Screen(as_json=True))
    with pytest.raises(ModuleNotFoundError) if imports else nullcontext():
        assert session.run(flow, trains=trains) == "learned"
