"""Stored cells of every release are read, and say the same for ever."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import pytest

from benchmarks.stored_cells import FIXED, Memory, in_full, name_of_memory, read_stored_cells, with_memory
from benchmarks.tables import departures, protocols
from deal_core.config import AdapterConfig, TrainConfig
from deal_core.errors import DataValidationError

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
OLD = {"schema_version": 2, "strategy": "deal", "train": {"learning_rate": 0.1}, "method": {"rehearsal.texts": "own"}}


@pytest.mark.parametrize("folder", ["continual", "development"])
def test_a_stored_cell_says_every_setting_of_its_training(folder: str) -> None:
    cells = read_stored_cells(RESULTS / folder)
    assert len(cells) > 80
    for cell in cells:
        settings = cell["settings"]
        assert settings["schema_version"] == 3 and settings["revision"] >= 1 and settings["scoring"] == "generated"
        assert {*TrainConfig().deciding()} <= {*settings["train"]}
        assert {*settings["adapter"]} == {*asdict(AdapterConfig())}


def test_what_an_old_cell_left_out_is_what_it_was_then() -> None:
    full = in_full(OLD)
    assert full["train"]["schedule"] == "constant" and full["prompt"] == "plain"
    assert full["method"]["rehearsal.answers"] == "parent" and full["method"]["rehearsal.texts"] == "own"
    assert in_full({**OLD, "strategy": "seq_lora", "method": {}})["method"] == {}
    said = {**OLD, "train": {"schedule": "linear"}, "prompt": "chat"}
    assert in_full(said)["train"]["schedule"] == "linear" and in_full(said)["prompt"] == "chat"


def test_a_setting_that_is_gone_stays_where_it_changed_something() -> None:
    method = {"rehearsal.texts": "own", "deal.recycle": True, "deal.project": False}
    full = in_full({**OLD, "train": {"prompt_loss_weight": 0.5}, "method": method})
    assert "deal.recycle" not in full["method"] and full["method"]["deal.project"] is False
    assert full["train"]["prompt_loss_weight"] == 0.5
    assert "prompt_loss_weight" not in in_full({**OLD, "train": {"prompt_loss_weight": 0.0}})["train"]


def test_a_cell_without_the_settings_that_are_gone_shares_a_table_with_cells_that_say_them(tmp_path: Path) -> None:
    cells = read_stored_cells(RESULTS / "continual")
    cell = next(cell for cell in cells if cell["settings"]["strategy"] == "deal")
    said = cell["settings"]["train"]
    shorter = {name: value for name, value in said.items() if name not in FIXED}
    for seed, train in enumerate((said, shorter, {**said, "min_steps": 77})):
        settings = {**cell["settings"], "seed": seed, "train": train}
        (tmp_path / f"deal-{seed}.json").write_text(json.dumps({**cell, "settings": settings}))
    then, today, other = read_stored_cells(tmp_path)
    assert then["settings"]["train"] == today["settings"]["train"] == said
    assert other["settings"]["train"]["min_steps"] == 77
    assert [len(table.cells) for table in protocols([then, today, other])] == [2, 1]


@pytest.mark.parametrize(
    ("said", "memory"),
    [
        ({"rehearsal.texts": "arrival"}, "none"),
        ({"rehearsal.texts": "own"}, "tests"),
        ({"rehearsal.texts": "both", "rehearsal.stored_share": 0.1}, "rows"),
    ],
    ids=["none", "tests", "rows"],
)
def test_what_a_cell_says_of_its_rehearsal_is_read_as_its_memory(said: dict[str, Any], memory: Memory) -> None:
    """Settings that had their default then are left out, so that today's defaults have no part in it."""
    then = {"rehearsal.answers": "parent", "rehearsal.rows_per_step": 4, "rehearsal.max_stored_rows": None, **said}
    assert with_memory("deal", then) == {"memory": memory}
    other = with_memory("deal", {**then, "deal.energy": 0.5, "rehearsal.rows_per_step": 8})
    assert other == {"memory": memory, "deal.energy": 0.5, "rehearsal.rows_per_step": 8}
    assert "memory" not in with_memory("replay", then), "it is a setting of `deal`"
    cell = {"settings": {"strategy": "deal", "method": other, "train": {}, "revision": 3}}
    assert departures(cell) == f"{name_of_memory(memory)}, rehearsal.rows_per_step 8, deal.energy 0.5"


def test_a_rehearsal_that_no_memory_stood_for_is_said_as_it_was() -> None:
    method = {"rehearsal.texts": "both", "rehearsal.stored_share": 0.2}
    assert with_memory("deal", method) == method
    assert with_memory("deal", {"rehearsal.texts": "none"}) == {"rehearsal.texts": "none"}
    today = {"rehearsal.rows": 50, "rehearsal.per_step": 4}
    assert with_memory("deal", today) == today, "a cell of this release"


def test_stored_cells_of_deal_say_their_memory_and_no_cell_is_taken_for_one_that_keeps_rows() -> None:
    cells = [cell for cell in read_stored_cells(RESULTS / "continual") if cell["settings"]["strategy"] == "deal"]
    earlier = [cell for cell in cells if "rehearsal.rows" not in cell["settings"]["method"]]
    memories = {cell["settings"]["method"].get("memory") for cell in earlier}
    assert {*get_args(Memory)} <= memories and len(earlier) > 20
    assert all(departures(cell) for cell in earlier), "today's defaults have no name"


def test_a_cell_of_an_unknown_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "deal-0-a.json").write_text(json.dumps({"settings": {**OLD, "schema_version": 1}}))
    with pytest.raises(DataValidationError, match=r"deal-0-a\.json has schema version 1"):
        read_stored_cells(tmp_path)
