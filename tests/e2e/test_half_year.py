"""Half a year of a lineage in short, with few rows a month, as a person sees it: commands, files and what they print.

Two departments send messages from April on. In June 58 % of the labels are wrong. In August July's rows have to go,
from the weights too. Rows of both departments are kept apart: what the champion answers to them is the truth.

Nightly: three adaptations on the built-in base model.
"""

from __future__ import annotations

import csv
import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from deal_core.evaluation.interval import wilson_interval
from tests.e2e.command import deal

pytestmark = [pytest.mark.e2e, pytest.mark.base_model]

EXAMPLES = Path(__file__).parents[2] / "examples"
NUM_FIRST, NUM_LATER, NUM_TEST = 66, 38, 60
WRONG = 0.58
Rows = list[tuple[str, str]]
SPEC = """
lineage: desk
task: {name: %s, data: %s, test_data: %s, instruction: Choose the topic of the message.}
gate: {arrival: hold, min_gain_points: 0}
train: {num_epochs: 3}
"""


def months(folder: Path, name: str) -> dict[str, Rows]:
    """The rows of a department: those of the first month, of a later one, test rows, and those that are kept apart."""
    rows: Rows = []
    for part in ("train", "test"):
        if (path := EXAMPLES / name / f"{part}.jsonl").exists():
            rows += [(row["text"], row["label"]) for row in map(json.loads, path.read_text().splitlines())]
        else:
            with (EXAMPLES / name / f"{part}.csv").open(newline="") as file:
                rows += [(row["note"], row["finding"]) for row in csv.DictReader(file)]
    random.Random(7).shuffle(rows)
    ends = [0, NUM_TEST, NUM_TEST + NUM_FIRST, NUM_TEST + NUM_FIRST + NUM_LATER, len(rows)]
    parts = [rows[first:last] for first, last in pairwise(ends)]
    return dict(zip(("test", "first", "later", "truth"), parts, strict=True))


def write(path: Path, rows: Rows) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


def with_wrong_labels(rows: Rows) -> Rows:
    """The rows, a share of them with another label."""
    generator, labels = random.Random(3), sorted({label for _, label in rows})
    wrong = set(generator.sample(range(len(rows)), round(WRONG * len(rows))))
    return [
        (text, generator.choice([other for other in labels if other != label]) if place in wrong else label)
        for place, (text, label) in enumerate(rows)
    ]


@pytest.mark.nightly(minutes=8)
def test_half_a_year_of_a_lineage_with_few_rows_a_month(tmp_path: Path) -> None:
    home = tmp_path / "home"
    bank, clinic = months(tmp_path, "bank"), months(tmp_path, "clinic")

    def learn(month: str, task: str, rows: Rows, expect: int = 0) -> Any:
        tests = write(tmp_path / f"{task}-tests.csv", {"bank": bank, "clinic": clinic}[task]["test"])
        spec = tmp_path / f"{month}.yaml"
        spec.write_text(SPEC % (task, write(tmp_path / f"{month}.csv", rows), tests))
        return deal(home, "adapt", str(spec), expect=expect)

    def truth(rows: Rows, version: str) -> float:
        """The share of the rows that are kept apart and that a version answers rightly."""
        file = write(tmp_path / "apart.csv", rows)
        out = tmp_path / f"apart-{version}.jsonl"
        options = ("--task", "clinic", "--version", version, "--lineage", "desk", "--out", str(out))
        deal(home, "predict", "--data", str(file), *options)
        answers = [json.loads(line)["answer"] for line in out.read_text().splitlines()]
        return sum(answer == label for answer, (_, label) in zip(answers, rows, strict=True)) / len(rows)

    assert learn("april", "bank", bank["first"])["status"] == "promoted"
    assert learn("may", "clinic", clinic["first"])["status"] == "promoted"

    # June is held before any training: its labels disagree with a champion that is sure of its answers.
    june = learn("june", "bank", with_wrong_labels(bank["later"]), expect=3)
    assert (june["status"], june["num_steps"], june["arrival"]["verdict"]) == ("held", 0, "labels disagree")
    assert len(june["contradictions"]) == 3
    (held,) = [arrival for arrival in deal(home, "data", "list") if arrival["state"].startswith("held")]
    assert held["file"] == "june.csv"

    # July's scores before and after it was learned have intervals that hold the truth.
    july = learn("july", "clinic", clinic["later"])
    assert (july["status"], july["version"], july["parent_version"]) == ("promoted", "3", "2")
    before, after = july["arrival"], july["accuracies"]["clinic"]
    assert before["low"] <= truth(clinic["truth"], "2") <= before["high"]
    low, high = wilson_interval(after, NUM_TEST)
    true_after = truth(clinic["truth"], "3")
    assert low <= true_after <= high

    # July's rows go. What that costs is said: the scores of the champion and of what replaces it, on the same rows.
    gone = deal(home, "data", "delete", "july.csv", "--relearn", "--lineage", "desk", "--yes", expect=(0, 3))
    assert gone["before"].keys() == gone["accuracies"].keys() == {"bank", "clinic"}
    assert gone["before"]["clinic"] == pytest.approx(after) and gone["num_rows"]["clinic"] == NUM_TEST
    (known,) = deal(home, "lineage", "branch", "desk")
    assert known["judgement"]["before"] == gone["before"]
    assert (gone["status"] == "stopped") is bool(known["judgement"]["reasons"])
    if gone["status"] == "stopped":  # the loss is beyond the limits, so a person decides
        reason = ("--accept", "--reason", "the rows had to go")
        (known,) = deal(home, "lineage", "branch", "desk", *reason)
    assert known["end"]["outcome"] == "swapped"
    assert deal(home, "version", "list", "--lineage", "desk")[-1]["version"] == "3", "no version had to be made again"
