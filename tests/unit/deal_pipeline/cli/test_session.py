"""The frame of a command: its common options, what is printed of its result, and the exit code."""

from __future__ import annotations

import gc
import json
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import typer
from pydantic import BaseModel
from typer.testing import CliRunner

from deal_core.errors import DealError
from deal_pipeline.cli.console import Screen
from deal_pipeline.cli.session import CommandResult, Events, Session, command
from tests.in_process import put_back


class Found(BaseModel):
    """A result."""

    number: int


@dataclass(frozen=True)
class Pair:
    """A result that a command puts together itself."""

    first: Found
    others: tuple[Found, ...]


@pytest.fixture
def app(home: Path) -> typer.Typer:
    group = typer.Typer()

    @command(group, "looking")
    def look(
        deal: Session, number: Annotated[int, typer.Option("--number")], failed: bool = False, rejected: bool = False
    ) -> CommandResult[list[Found] | OnlyForTypes]:  # noqa: F821
        """Look for a number."""
        found = Found(number=number)
        return CommandResult([found, found], [f"Found {number} in {deal.home}."], failed=failed, rejected=rejected)

    @command(group, name="follow")
    def follow_numbers(deal: Session) -> Events[Found | Pair]:
        """Tell two events."""
        events: Events[Found | Pair] = Events(deal.screen)
        events.tell(Found(number=1), "one")
        events.tell(Pair(first=Found(number=2), others=(Found(number=3),)), "two and three")
        return events

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


def test_events_are_told_as_lines(app: typer.Typer) -> None:
    with put_back():
        assert CliRunner().invoke(app, ["follow"]).stdout == "one\ntwo and three\n"
        told = [json.loads(line) for line in CliRunner().invoke(app, ["follow", "--json"]).stdout.splitlines()]
    assert told == [{"number": 1}, {"first": {"number": 2}, "others": [{"number": 3}]}]


def test_an_api_that_never_starts_ends_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def flow() -> None:
        raise AssertionError("There is no API that could run it.")

    monkeypatch.setattr("deal_pipeline.server.embedded.start_api", Future)
    monkeypatch.setattr("deal_pipeline.server.embedded.API_SECONDS", 0.01)
    with pytest.raises(DealError, match="has not started"):
        Session(home=tmp_path, screen=Screen(as_json=True)).run(flow)
    assert gc.isenabled()
