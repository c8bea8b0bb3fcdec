"""What a run takes from its lineage where its spec leaves the choice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from deal_core.config import AdapterConfig
from deal_core.errors import ConfigError
from deal_core.method_config import RehearsalConfig
from tasks.lineage.choices import changed_settings, choose_adapter, choose_base, choose_strategy
from tasks.spec import AdaptSpec, parse
from tests.unit.test_stored_json import RECORD


def spec(**given: Any) -> AdaptSpec:
    return parse(AdaptSpec, {"task": {"name": "t", "data": "x.csv"}, **given}, "test")


def test_a_lineage_supplies_what_a_spec_leaves_open() -> None:
    lineage = replace(RECORD, strategy="replay")
    left_open = spec()
    assert choose_base(left_open, lineage) == lineage.base.source
    assert choose_adapter(left_open, lineage) == lineage.adapter
    assert choose_strategy(left_open, lineage) == "replay"
    said = spec(base_model="another", strategy="deal")
    assert (choose_base(said, lineage), choose_strategy(said, lineage)) == ("another", "deal")
    assert choose_adapter(spec(adapter={"rank": 3}), None) == AdapterConfig(rank=3)
    with pytest.raises(ConfigError, match="shape"):
        choose_adapter(spec(adapter={"rank": 3}), lineage)


def test_options_that_the_lineages_strategy_does_not_take_are_refused() -> None:
    """A spec without a strategy does not know it when it is read."""
    read = spec(strategy_options={"weight": 3})
    with pytest.raises(ConfigError, match=r"Strategy 'deal' has no option 'weight'; it takes none\."):
        choose_strategy(read, None)


def test_settings_that_differ_from_the_parents_are_named() -> None:
    longer = spec(train={"num_epochs": 6, "num_processes": 2}, gate={"max_drop_points": 3})
    before = longer.model_dump(mode="json")
    assert changed_settings(longer, before, "4") == ()
    (note,) = changed_settings(spec(), before, "4")
    assert note == (
        "settings that differ from version 4's: train.num_epochs 3 (before: 6), gate.max_drop_points 10.0 (before: 3.0)"
    )
    (note,) = changed_settings(longer.model_copy(update={"rehearsal": RehearsalConfig(rows=9)}), before, "4")
    assert note.endswith("rehearsal.rows 9 (before: 50)")
    earlier = {**before, "memory": "rows", "rehearsal": {"texts": "both", "stored_share": 0.1}}
    assert changed_settings(longer, earlier, "4") == (), "settings that are gone are none of today's"
    del before["gate"], before["train"]["num_epochs"]
    assert changed_settings(spec(), before, "4") == (), "an old spec may lack a setting"
