"""The headline: one JSON object and tables from the stored cells."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from typer.testing import CliRunner

from benchmarks.headline import CELLS, arms, bootstrap_ratio, headline, judged_accuracy, main, t_interval, worst_task
from benchmarks.method.protocol import JUDGED
from benchmarks.stored_cells import Memory, name_of_memory, read_stored_cells
from benchmarks.tables import departures, protocols
from deal_core.benchmark.summary import CellJson

app = typer.Typer()
app.command()(main)


@pytest.fixture(scope="module")
def cells() -> list[CellJson]:
    return read_stored_cells(CELLS)


def test_the_command_prints_one_object_and_tables_for_people() -> None:
    done = CliRunner().invoke(app, [])
    found = json.loads(done.stdout)
    assert done.exit_code == 0 and found["schema_version"] == 4 and found["tables"]
    for title, table in found["tables"].items():
        assert title in done.stderr
        ours = table["arms"].get("memory none", {})
        if "ratio_to_joint" not in ours:
            continue
        low, high = ours["ratio_to_joint_ci95_over_rows"]
        assert 0 < low < ours["ratio_to_joint"] < high
        joint = table["arms"]["joint"]
        if ours["seeds"] == joint["seeds"]:  # the ratio is a mean over seeds that both have
            assert ours["ratio_to_joint"] == pytest.approx(ours["judged_accuracy"] / joint["judged_accuracy"], abs=0.02)
        assert ours["worst_task"]["task"] in table["judged_tasks"] and ours["worst_task"]["points"] <= 0


def test_settings_without_the_bounds_are_judged_by_the_tasks_that_earlier_settings_lifted(
    cells: list[CellJson],
) -> None:
    bounds = {"base", "per_task"}
    without = [cell for cell in cells if cell["settings"]["strategy"] not in bounds]
    of_fifteen = [table for title, table in headline(without)["tables"].items() if title.startswith("suite 15,")]
    assert of_fifteen and all(table["judged_tasks"] == sorted(JUDGED) for table in of_fifteen)


def test_the_folder_of_the_cells_and_the_tables_are_options(tmp_path: Path) -> None:
    none = CliRunner().invoke(app, ["--cells", str(tmp_path)])
    assert none.exit_code == 0 and json.loads(none.stdout)["tables"] == {}
    quiet = CliRunner().invoke(app, ["--no-people"])
    assert json.loads(quiet.stdout)["tables"] and quiet.stderr == ""


def test_versions_that_unlearned_their_preference_for_labels_are_an_arm_of_their_own(cells: list[CellJson]) -> None:
    ours = (cell for cell in cells if cell["settings"]["strategy"] == "deal")
    plain = next(cell for cell in ours if departures(cell) == name_of_memory("none"))
    recentred = deepcopy(dict(plain))
    recentred["settings"]["train"]["recentre_steps"] = 50
    table = next(iter(protocols([plain, recentred])))
    found = {name: each for name, each in arms(table).items() if each}
    assert found == {"memory none": [plain], "memory none, re-centred": [recentred]}


def test_no_table_takes_the_place_of_another(cells: list[CellJson]) -> None:
    others = []
    for cell in cells:
        other: dict[str, Any] = deepcopy(dict(cell))
        other["settings"] |= {"max_test_rows": 7}
        others.append(other)
    alone, all_cells = headline(cells)["tables"], headline([*cells, *others])["tables"]
    more = all_cells.keys() - alone.keys()
    assert len(more) == len(alone) and all("max_test_rows 7" in title for title in more)


def test_cells_of_other_training_settings_have_tables_of_their_own(cells: list[CellJson]) -> None:
    others = []
    for cell in cells:
        other: dict[str, Any] = deepcopy(dict(cell))
        other["settings"]["train"]["num_epochs"] = 77
        others.append(other)
    alone, apart = headline(cells)["tables"], headline(others)["tables"]
    assert apart and not any(table["is_default"] for table in apart.values())
    assert headline([*cells, *others])["tables"] == {**alone, **apart} and not alone.keys() & apart.keys()


def test_an_arm_has_the_cells_of_its_memory_alone(cells: list[CellJson]) -> None:
    for protocol in protocols(cells):
        found = arms(protocol)
        for memory in get_args(Memory):
            methods = [cell["settings"]["method"] for cell in found[f"memory {memory}"]]
            assert all(method["memory"] == memory for method in methods)
            assert not [name for method in methods for name in method if name.startswith("rehearsal.")]
        ids = [id(cell) for each in found.values() for cell in each]
        assert len(ids) == len(set(ids))


def cell(strategy: str, *outcomes: dict[str, str]) -> dict[str, Any]:
    versions = [{"scores": {name: {"correct": bits} for name, bits in scores.items()}} for scores in outcomes]
    return {"settings": {"strategy": strategy, "tasks": ["a", "b"], "scored": "ends", "seed": 0}, "versions": versions}


def test_the_worst_task_is_measured_against_its_best_version() -> None:
    forgetful = cell("deal", {"a": "1111"}, {"a": "1000", "b": "1100"})
    assert worst_task([forgetful], ["a", "b"]) == {"task": "a", "points": -75.0}
    assert worst_task([forgetful], ["b"]) == {"task": "b", "points": 0.0}


def test_intervals_hold_the_ratio_and_shrink_to_a_point_where_nothing_varies() -> None:
    same = cell("deal", {"a": "1111", "b": "1111"})
    assert bootstrap_ratio([(same, same)], ["a", "b"]) == [1.0, 1.0]
    half = cell("joint", {"a": "1100", "b": "1111"})
    low, high = bootstrap_ratio([(half, same)], ["a", "b"])
    assert low < judged_accuracy(half, ["a", "b"]) / 100 < high
    assert t_interval([1.0]) is None and t_interval([2.0, 2.0]) == [2.0, 2.0]
