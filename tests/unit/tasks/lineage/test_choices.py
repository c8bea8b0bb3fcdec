"""What a run takes from its lineage where its spec leaves the choice."""

from __future__ import annotations

from typing import Any

import pytest

from deal_core.errors import ConfigError
from deal_core.method_config import RehearsalConfig
from tasks.lineage.choices import changed_settings, choose_strategy
from tasks.spec import AdaptSpec, parse


def spec(**given: Any) -> AdaptSpec:
    return parse(AdaptSpec, {"task": {"name": "t", "data": "x.csv"}, **given}, "test")


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
    (note,) = changed_settings(spec(selection={"keep": 0.2}), spec().model_dump(mode="json"), "1")
    assert note.endswith("selection.keep 0.2 (before: null)")
    (note,) = changed_settings(longer.model_copy(update={"rehearsal": RehearsalConfig(rows=9)}), before, "4")
    assert note.endswith("rehearsal.rows 9 (before: 50)")
    earlier = {**before, "memory": "rows", "rehearsal": {"texts": "both", "stored_share": 0.1}}
    assert changed_settings(longer, earlier, "4") == (), "settings that are gone are none of today's"
    del before["gate"], before["train"]["num_epochs"]
    assert changed_settings(spec(), before, "4") == (), "an old spec may lack a setting"
    (note,) = changed_settings(
        spec(
            train=dict.fromkeys(("num_epochs", "max_steps", "batch_size", "seed"), 7),
            evaluate={"max_old_rows": 7},
            rehearsal={"rows": 7, "per_step": 7},
        ),
        spec().model_dump(mode="json"),
        "1",
    )
    assert note.count("before") == 6 and note.endswith(", and 1 more")
