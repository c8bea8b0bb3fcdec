"""A cell's digest names its file, so cells that are stored already are found again."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest

from benchmarks.continual.cell import Cell, make_cell, revision_of
from benchmarks.continual.summary import departures
from deal_core.config import NOT_DECIDING, AdapterConfig, TrainConfig
from deal_core.method_config import MethodConfig, SelectionConfig


def test_a_cell_says_every_setting_that_decides_its_result() -> None:
    said = cell_of("deal", MethodConfig()).to_json()
    assert said["schema_version"] == 3 and said["revision"] == revision_of("deal")
    fields = {*said["train"], *NOT_DECIDING, "validation_share"}  # 0 is not said, so cells of before are found
    assert fields == {*asdict(TrainConfig())}
    parts = asdict(MethodConfig())
    assert {*said["method"]} == {f"{part}.{name}" for part in ("deal", "rehearsal") for name in parts[part]}


def test_cells_that_differ_in_prompts_or_scoring_share_no_file_and_no_first_version() -> None:
    plain = cell_of("seq_lora", MethodConfig())
    for other in (replace(plain, prompt="chat"), replace(plain, scoring="likeliest")):
        assert plain.digest() != other.digest()
        assert None is not plain.shared_digest() != other.shared_digest() is not None
    unused = replace(plain, scores_unused=True)
    assert plain.digest() != unused.digest() and plain.shared_digest() == unused.shared_digest()


def cell_of(strategy: str, method: MethodConfig) -> Cell:
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


SELECTING = MethodConfig(selection=SelectionConfig(keep=0.3, score="loss"))


@pytest.mark.parametrize("strategy", ["deal", "seq_lora", "replay"])
def test_a_selecting_cell_is_another_cell_and_shares_no_first_version(strategy: str) -> None:
    plain, selecting = cell_of(strategy, MethodConfig()), cell_of(strategy, SELECTING)
    assert not any(name.startswith("selection.") for name in plain.method)
    assert plain.digest() != selecting.digest()
    assert selecting.method["selection.keep"] == 0.3 and selecting.shared_digest() is None
    assert departures({"settings": plain.to_json()}) == ""
    assert departures({"settings": selecting.to_json()}) == ", ".join(["selection.keep 0.3", "selection.score loss"])


def test_a_bound_selects_nothing_and_keeps_its_digest() -> None:
    assert cell_of("joint", SELECTING).digest() == cell_of("joint", MethodConfig()).digest()
