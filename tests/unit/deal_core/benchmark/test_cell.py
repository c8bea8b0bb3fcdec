"""A cell's digest names its file, so cells that are stored already are found again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deal_core.benchmark.cell import BOUNDS, Cell, make_cell, revision_of
from deal_core.benchmark.summary import departures
from deal_core.config import AdapterConfig, TrainConfig, as_stored
from deal_core.method_config import MethodConfig, SelectionConfig
from deal_core.strategies import find_strategies

RESULTS = Path(__file__).parents[4] / "benchmarks" / "results"


def settings_in(folder: str) -> dict[str, dict[str, Any]]:
    """File names of the stored cells of today's revision, and the settings in them."""
    found = {
        path.name: json.loads(path.read_text(encoding="utf-8"))["settings"]
        for path in sorted((RESULTS / folder).glob("*-*.json"))
    }
    known = {
        name: each
        for name, each in found.items()
        if each["strategy"] in (*find_strategies(), *BOUNDS) and "prompt_loss_weight" not in each["train"]
    }
    return {name: each for name, each in known.items() if each.get("revision", 1) == revision_of(each["strategy"])}


def cell_of(settings: dict[str, Any]) -> Cell:
    """The cell that was stored."""
    values = {name: value for name, value in settings.items() if name not in ("schema_version", "revision")}
    adapter, train = AdapterConfig(**values.pop("adapter")), TrainConfig(**as_stored("train", values.pop("train")))
    return Cell(**values | {"adapter": adapter, "train": train, "tasks": tuple(values["tasks"])})


def test_cells_with_chat_prompts_share_no_file_and_no_first_version_with_plain_ones() -> None:
    settings = next(iter(settings_in("continual").values())) | {"strategy": "seq_lora", "method": {}}
    plain = cell_of(settings)
    chat = replace(plain, prompt="chat")
    assert "prompt" not in plain.to_json() and chat.to_json()["prompt"] == "chat"
    assert plain.digest() != chat.digest()
    assert None is not plain.shared_digest() != chat.shared_digest() is not None


@pytest.mark.parametrize("folder", ["continual", "development"])
def test_stored_cells_of_todays_revision_keep_their_digests(folder: str) -> None:
    stored = settings_in(folder)
    assert len(stored) >= 30, "the stored cells were found"
    assert {name: cell_of(settings).file_name for name, settings in stored.items()} == {name: name for name in stored}


def made(strategy: str, method: MethodConfig) -> Cell:
    return make_cell(
        strategy,
        ("a", "b"),
        method=method,
        seed=0,
        train=TrainConfig(),
        rows=9,
        part="dev",
        max_test_rows=None,
        scored="all",
        adapter=AdapterConfig(),
        base="b",
        data="d",
    )


SELECTING = MethodConfig(selection=SelectionConfig(keep=0.3, score="loss", pick="low"))


@pytest.mark.parametrize("strategy", ["deal", "seq_lora", "ella"])
def test_a_selecting_cell_is_another_cell_and_shares_no_first_version(strategy: str) -> None:
    plain, selecting = made(strategy, MethodConfig()), made(strategy, SELECTING)
    assert not any(name.startswith("selection.") for name in plain.method)
    idle = MethodConfig(selection=SelectionConfig(max_scored=9))
    assert made(strategy, idle).digest() == plain.digest() != selecting.digest()
    assert selecting.method["selection.keep"] == 0.3 and selecting.shared_digest() is None
    memory = ["memory none"] if strategy == "deal" else []
    assert departures({"settings": plain.to_json()}) == ", ".join(memory)
    assert departures({"settings": selecting.to_json()}) == ", ".join(
        [*memory, "selection.keep 0.3", "selection.score loss", "selection.pick low"]
    )


def test_a_bound_selects_nothing_and_keeps_its_digest() -> None:
    assert made("joint", SELECTING).digest() == made("joint", MethodConfig()).digest()
