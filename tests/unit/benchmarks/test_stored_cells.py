"""Stored cells of every release are read, and say the same for ever."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks.stored_cells import Memory, in_full, name_of_memory, read_stored_cells, with_memory
from benchmarks.tables import departures
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


def test_a_cell_of_an_unknown_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "deal-0-a.json").write_text(json.dumps({"settings": {**OLD, "schema_version": 1}}))
    with pytest.raises(DataValidationError, match=r"deal-0-a\.json has schema version 1"):
        read_stored_cells(tmp_path)
