"""A year of one lineage: its rows, and what the page says of its steps."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.year import FIGURES, PAGE, PICTURE, app
from benchmarks.year_rows import NUM_FIRST, TASKS, messages, slipped


@pytest.mark.parametrize("task", TASKS)
def test_messages_are_the_same_each_time_and_different_by_month(task: str) -> None:
    january = [*messages(task, 80, "January")]
    assert january == [*messages(task, 80, "January")]
    assert len({row["text"] for row in january}) == 80
    assert {*Counter(row["label"] for row in january).values()} == {80 // len(TASKS[task])}
    february = {row["text"] for row in messages(task, 80, "February")}
    assert sum(row["text"] in february for row in january) <= 2


def test_a_first_arrival_lacks_half_of_the_wordings_and_a_later_one_does_not() -> None:
    def wordings(kind: str) -> set[str]:
        texts = [row["text"].lower() for row in messages("transit", 200, "January", kind)]  # type: ignore[arg-type]
        known = [wording for label in TASKS["transit"].values() for wording in label]
        return {wording for wording in known if any(wording.lower() in text for text in texts)}

    first = {wording for label in TASKS["transit"].values() for wording in label[:NUM_FIRST]}
    assert wordings("first") == first < wordings("all")


def test_a_slipped_column_gives_most_rows_the_label_of_another() -> None:
    rows = [*messages("water", 40, "May")]
    wrong = slipped(rows)
    assert [row["text"] for row in wrong] == [row["text"] for row in rows]
    assert [row["label"] for row in wrong[1:]] == [row["label"] for row in rows[:-1]]
    assert wrong[0]["label"] == rows[-1]["label"]
    assert sum(row["label"] != right["label"] for row, right in zip(wrong, rows, strict=True)) > 24


def test_the_page_says_what_happened_and_who_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = {
        "month": "April",
        "task": "water",
        "num_rows": 40,
        "event": None,
        "status": "promoted",
        "reasons": [],
        "arrival": None,
        "champion": "4",
        "is_new": True,
        "accuracies": {"transit": 0.9, "water": 0.7},
        "seconds": 60.0,
    }
    held = step | {"month": "May", "status": "held", "is_new": False, "arrival": {"accuracy": 0.35, "reference": 0.8}}
    rejected = step | {"month": "June", "status": "rejected", "is_new": False, "reasons": ["transit fell."]}
    back = step | {"month": "June", "status": None, "task": None, "num_rows": None, "event": "rolled back"}
    worse = back | {"status": "accepted", "event": "May deleted", "champion": "6"}
    monkeypatch.chdir(tmp_path)
    FIGURES.parent.mkdir(parents=True)
    FIGURES.write_text(json.dumps({"steps": [step, held, rejected, back, worse]}))
    PAGE.parent.mkdir()
    done = CliRunner().invoke(app, ["page"])
    assert done.exit_code == 0, done.output
    rows = [line.split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")][1:]
    assert [row[0].strip("| ") for row in rows] == ["April", "May", "June", "June", "June"]
    what = [row[3] for row in rows]
    assert "version 4" in what[0] and "35 %" in what[1] and "80 %" in what[1] and "transit fell." in what[2]
    assert what[3].startswith("rolled back") and "version 6" in what[4] and "a person" in what[4]
    assert [row[4] for row in rows] == ["90.0"] * 5 and rows[0][-1].strip(" |") == "80.0"
    assert PICTURE.stat().st_size > 10_000
