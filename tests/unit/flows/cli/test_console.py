"""A command's screen: text from outside is shown as it is, and does nothing."""

from __future__ import annotations

import json

import pytest

from deal_core.errors import MAX_ERROR_CHARS, DealError, in_one_line
from flows.cli.console import Screen
from flows.cli.tables import new_table

EVIL = "\x1b[31m[red]a\x9b31m\u202e[/]\x07\ud800 [link=http://x]b"
SHOWN = r"\x1b[31m[red]a\x9b31m\u202e[/]\x07\ud800 [link=http://x]b"


def test_nothing_that_is_shown_reaches_the_terminal_raw(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.markup import escape

    screen = Screen()
    table = new_table(escape(EVIL))
    table.add_row(escape(EVIL))
    screen.result({}, escape(EVIL), table)
    screen.said(EVIL)
    screen.stage_finished("train", 1.0, EVIL)
    screen.error(EVIL)
    found = capsys.readouterr()
    out, err = ("".join(text.split()) for text in found)  # a long line is folded
    assert (out.count("".join(SHOWN.split())), err.count("".join(SHOWN.split()))) == (3, 3)
    assert not {"\x1b", "\x9b", "\u202e", "\x07", "\ud800"} & {*found.out, *found.err}


def test_json_says_the_same_and_does_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen(as_json=True)
    screen.result({"label": EVIL})
    screen.error(EVIL)
    found = capsys.readouterr()
    assert json.loads(found.out) == {"label": EVIL} and json.loads(found.err) == {"error": EVIL}
    assert not {"\x1b", "\x9b", "\u202e", "\x07", "\ud800"} & {*found.out, *found.err}


def test_an_error_takes_one_line_and_no_more_than_a_screen() -> None:
    assert in_one_line(DealError(f"a\n{EVIL}")) == f"a {SHOWN}"
    assert len(in_one_line(DealError("x" * 10**6))) == MAX_ERROR_CHARS


def test_a_flow_inside_a_command_goes_on_with_the_bar_of_the_command() -> None:
    screen = Screen()
    screen.draws = True
    with screen.working("starting"):
        drawn = screen._progress
        assert drawn is not None
        with screen.working("looking"):
            assert screen._progress is drawn and [task.description for task in drawn.tasks] == ["looking"]
        assert screen._progress is drawn
    assert screen._progress is None
