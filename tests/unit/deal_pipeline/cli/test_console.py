"""What a command prints: text from outside is shown as it is, and does nothing."""

from __future__ import annotations

import json

import pytest
from rich.markup import escape

from deal_core.errors import MAX_ERROR_CHARS, DealError, in_one_line
from deal_pipeline.cli.console import Screen
from deal_pipeline.cli.render import render

EVIL = "\x1b[31m[red]a\x9b31m\u202e[/]\x07\ud800 [link=http://x]b"
SHOWN = r"\x1b[31m[red]a\x9b31m\u202e[/]\x07\ud800 [link=http://x]b"


def test_nothing_that_is_shown_reaches_the_terminal_raw(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen()
    screen.result({}, escape(EVIL), *render([{EVIL: EVIL}]))
    screen.said(EVIL)
    screen.stage_finished("train", 1.0, EVIL)
    screen.error(EVIL, "error")
    found = capsys.readouterr()
    out, err = ("".join(text.split()) for text in found)  # a long line is folded
    assert (out.count("".join(SHOWN.split())), err.count("".join(SHOWN.split()))) == (3, 3)
    assert not {"\x1b", "\x9b", "\u202e", "\x07", "\ud800"} & {*found.out, *found.err}


def test_json_says_the_same_and_does_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen(as_json=True)
    screen.result({"label": EVIL})
    screen.error(EVIL, "error")
    found = capsys.readouterr()
    assert json.loads(found.out) == {"label": EVIL} and json.loads(found.err) == {"error": EVIL, "code": "error"}
    assert not {"\x1b", "\x9b", "\u202e", "\x07", "\ud800"} & {*found.out, *found.err}


def test_an_error_takes_one_line_and_no_more_than_a_screen() -> None:
    assert in_one_line(DealError(f"a\n{EVIL}")) == f"a {SHOWN}"
    assert len(in_one_line(DealError("x " * 10**6))) == MAX_ERROR_CHARS


def test_without_a_terminal_a_line_tells_the_progress_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("deal_pipeline.cli.console.time.monotonic", lambda: now)
    screens = [Screen(), Screen(as_json=True)]
    for second in range(101):
        now = float(second)
        for screen in screens:
            screen.advanced("train", second, 400, "loss 0.5")
    lines = [line.split() for line in capsys.readouterr().err.splitlines()]
    assert lines == [["train", str(done), "of", "400", "loss", "0.5"] for done in (30, 60, 90)]
