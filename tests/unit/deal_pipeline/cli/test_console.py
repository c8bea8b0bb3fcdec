"""What a command prints: the numbers are those of the result; text from outside is shown as it is, and does nothing."""

from __future__ import annotations

import json

import pytest
from rich.console import Console, RenderableType
from rich.markup import escape

from deal_core.errors import MAX_ERROR_CHARS, DealError, in_one_line
from deal_core.evaluation.accuracy_matrix import AccuracyMatrix
from deal_pipeline.cli.console import Screen, matrix_table, new_table, percent

EVIL = "\x1b[31m[red]a\x9b31m\u202e[/]\x07\ud800 [link=http://x]b"
SHOWN = r"\x1b[31m[red]a\x9b31m\u202e[/]\x07\ud800 [link=http://x]b"


def test_nothing_that_is_shown_reaches_the_terminal_raw(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen()
    table = new_table(escape(EVIL))
    table.add_row(escape(EVIL))
    screen.result({}, escape(EVIL), table)
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


def text(*shown: RenderableType) -> str:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for renderable in shown:
        console.print(renderable)
    return console.export_text()


def matrix() -> AccuracyMatrix:
    first = AccuracyMatrix().with_row("bank", {"bank": 0.5}, base_accuracy=0.25, parent_accuracy=None)
    second = first.with_row("clinic", {"bank": 0.375, "clinic": 0.75}, base_accuracy=0.125, parent_accuracy=0.2)
    return second.with_row(
        "parcels", {"bank": 0.375, "clinic": 0.75, "parcels": 1.0}, base_accuracy=0.0, parent_accuracy=0.1
    )


def test_the_matrix_has_base_and_versions_in_rows_and_a_dash_where_nothing_was_measured() -> None:
    lines = [line.split() for line in text(matrix_table(matrix().to_json())).splitlines() if line.strip()]
    assert lines[0] == ["after", "learning", "bank", "clinic", "parcels"]
    assert lines[2:] == [
        ["(base", "model)", "25.0", "12.5", "0.0"],
        ["bank", "50.0", "20.0", "–"],
        ["clinic", "37.5", "75.0", "10.0"],
        ["parcels", "37.5", "75.0", "100.0"],
    ]


def test_a_score_of_few_test_rows_stands_with_its_interval() -> None:
    found = AccuracyMatrix().with_row(
        "bank", {"bank": 0.85}, base_accuracy=0.25, parent_accuracy=None, num_rows={"bank": 20}
    )
    shown = text(matrix_table(found.to_json()))
    assert "bank, n 20" in shown and "25.0, 11–47" in shown and "85.0, 64–95" in shown


def test_an_undefined_score_is_a_dash_and_zero_is_zero() -> None:
    assert (percent(None), percent(0.0), percent(0.125)) == ("–", "0.0", "12.5")
