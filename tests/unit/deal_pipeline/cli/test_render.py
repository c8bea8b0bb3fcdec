"""The tables of the command line: what they show is what the fields of a result say, on a narrow screen too."""

from __future__ import annotations

import io
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated

from pydantic import BaseModel
from rich.console import Console, RenderableType

from deal_core.evaluation.accuracy_matrix import AccuracyMatrix
from deal_core.evaluation.interval import CellScore
from deal_core.shown import ACCEPTED, Shown
from deal_pipeline.cli.render import render, render_facts, render_matrix
from tests.stored_versions import version


class Run(BaseModel):
    """A result."""

    run_key: str = "not shown"
    name: Annotated[str, Shown()]
    share: Annotated[float | None, Shown("accuracy", unit="%")] = None
    lost: Annotated[float, Shown(unit="points", format="+.2f", spare=1)] = 0.5
    accepted: Annotated[bool, ACCEPTED] = True
    parent: Annotated[str | None, Shown(words={None: "base"})] = None
    began: Annotated[datetime | None, Shown("when", format="%H:%M", only="table"), Shown("begun", only="facts")] = None
    digest: Annotated[str, Shown(format=".4", only="facts")] = "abcdefgh"
    by_task: Annotated[dict[str, float], Shown("tasks", unit="%")] = {}

    @property
    def title(self) -> str:
        """Another text."""
        return self.name.upper()


@dataclass(frozen=True)
class Part:
    """A part of a result."""

    size: Annotated[int, Shown(unit="bytes")]
    is_bad: Annotated[bool, Shown("result", words={True: "alarm", False: ""}, is_state=True)] = False


def drawn(shown: list[RenderableType], width: int = 120, *, colours: bool = False) -> str:
    file = io.StringIO()
    console = Console(width=width, file=file, force_terminal=colours, highlight=False)
    for renderable in shown:
        console.print(renderable)
    return file.getvalue()


def cells(shown: list[RenderableType], width: int = 120) -> list[list[str]]:
    """The lines of a table without its rule, each as its cells."""
    lines = [line for line in drawn(shown, width).splitlines() if line.strip(" ─")]
    return [[cell.strip() for cell in line.strip().split("   ") if cell.strip()] for line in lines]


def test_a_column_is_drawn_as_its_field_says_and_left_out_without_a_value() -> None:
    began = datetime(2026, 5, 4, 12, 30).astimezone()
    first = Run(name="one", share=0.1256, began=began)
    second = Run(name="two", lost=-2, parent="1", accepted=False)
    assert cells(render([first, second], "Runs")) == [
        ["Runs"],
        ["name", "accuracy, %", "lost, points", "gate", "parent", "when"],
        ["one", "12.6", "+0.50", "accepted", "base", "12:30"],
        ["two", "–", "-2.00", "rejected", "1", "–"],
    ]
    assert render([], "Runs") == []


def test_one_result_has_a_line_for_each_field() -> None:
    run = Run(name="one", began=datetime(2026, 5, 4, 12, 30).astimezone(), by_task={"bank": 0.5, "clinic": 1.0})
    assert cells(render_facts(run)) == [
        ["name", "one"],
        ["lost, points", "+0.50"],
        ["gate", "accepted"],
        ["parent", "base"],
        ["begun", "2026-05-04 12:30"],
        ["digest", "abcd"],
        ["tasks, %", "bank 50.0, clinic 100.0"],
    ]
    assert cells(render_facts(Part(1), Part(2**21)))[0] == ["size", "1 B", "2.0 MiB"]


def test_results_side_by_side_stand_once() -> None:
    run, other = Run(name="one"), Run(name="two")
    rows = [(run, Part(5, is_bad=True)), (run, Part(2000)), (other, None)]
    assert cells(render(rows))[1:] == [
        ["one", "+0.50", "accepted", "base", "5 B", "alarm"],
        ["2.0 KiB"],
        ["two", "+0.50", "accepted", "base", "–", "–"],
    ]


def test_a_good_state_is_green_and_a_bad_one_red() -> None:
    text = drawn(render([Run(name="accepted"), Run(name="x", accepted=False)]), colours=True)
    assert "\x1b[32maccepted" in text and "\x1b[31mrejected" in text and " accepted " in text, "a name has no colour"


def test_on_a_narrow_screen_no_word_is_broken_and_spare_columns_are_left_out() -> None:
    rows = [{"what": "adapter of version", "where": "in the store", "why": "it was rejected 31 days ago"}]
    text = drawn(render(rows), 40)
    assert all(len(line) <= 40 for line in text.splitlines())
    assert {*" ".join(map(str, rows[0].values())).split()} <= {*text.split()}
    wide, narrow = (drawn(render([Run(name="one", share=0.5)]), width) for width in (80, 42))
    assert "points" in wide and "points" not in narrow and "accepted" in narrow


def test_figures_end_in_one_column_also_where_one_is_missing() -> None:
    lines = drawn(render([{"task": "a", "score": "24.5, 17–34"}, {"task": "b", "score": "–"}])).splitlines()
    (first,), (second,) = ([line.rstrip() for line in lines if f" {task} " in line] for task in "ab")
    assert len(first) == len(second) and second.endswith("–")


def test_the_longest_texts_are_broken_into_lines_and_short_ones_stay_whole() -> None:
    long = "a sentence of many words that has no room on this screen and goes on and on"
    text = drawn(render([{"why": long, "label": "suspected fraud", "answer": "loan question"}]), 60)
    assert "suspected fraud" in text and "loan question" in text and long not in text


def matrix() -> AccuracyMatrix:
    first = AccuracyMatrix().with_row("bank", {"bank": 0.5}, base_accuracy=0.25, parent_accuracy=None)
    return first.with_row("clinic", {"bank": 0.375, "clinic": 0.75}, base_accuracy=0.125, parent_accuracy=0.2)


def test_the_matrix_has_base_and_versions_in_rows_and_a_dash_where_nothing_was_measured() -> None:
    assert cells(render_matrix(matrix().to_json(), "Scores")) == [
        ["Scores"],
        ["after learning", "bank", "clinic"],
        ["(base model)", "25.0", "12.5"],
        ["bank", "50.0", "20.0"],
        ["clinic", "37.5", "75.0"],
    ]


def test_a_score_of_few_test_rows_stands_with_its_interval() -> None:
    few = AccuracyMatrix().with_row(
        "bank", {"bank": 0.85}, base_accuracy=0.25, parent_accuracy=None, num_rows={"bank": 20}
    )
    shown = drawn(render_matrix(few.to_json(), "Scores"))
    assert "bank, n 20" in shown and "25.0, 11–47" in shown and "85.0, 64–95" in shown
    assert "85.0, 64–95, n 20" in drawn(render([{"now": CellScore(0.85, 20)}]))


def test_a_version_stands_with_what_became_of_it() -> None:
    versions = [
        version(1, accepted=True, standing="learned", aliases=("previous",)),
        version(2, 1, accepted=True, standing="learned", unsure=("few rows",), aliases=("challenger", "champion")),
        version(3, 2, standing="rejected by the gate", created=datetime(2026, 5, 4, tzinfo=UTC)),
    ]
    lines = cells(render(versions))
    assert [line[0] for line in lines[1:]] == ["1", "2", "3"]
    assert [line[-3] for line in lines[1:]] == ["learned", "learned, unsure", "rejected by the gate"]
    assert ["state", "learned, unsure"] in cells(render_facts(versions[1]))
