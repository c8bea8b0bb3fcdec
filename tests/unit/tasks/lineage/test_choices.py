"""What a run takes from its lineage where its spec leaves the choice."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from deal_core.errors import ConfigError
from deal_core.method_config import Memory
from tasks.lineage.choices import changed_settings, choose_spared, choose_strategy, with_memory_of
from tasks.lineage.record import LineageRecord
from tasks.references import Spared
from tasks.spec import AdaptSpec, parse
from tests.unit.test_stored_json import RECORD


def spec(**given: Any) -> AdaptSpec:
    return parse(AdaptSpec, {"task": {"name": "t", "data": "x.csv"}, **given}, "test")


def record(memory: Memory | None) -> LineageRecord:
    return LineageRecord.from_json({**RECORD.to_json(), "memory": memory})


def test_a_memory_that_contradicts_the_strategy_is_refused() -> None:
    for strategy, memory in (("replay", "none"), ("replay", "tests"), ("seq_lora", "tests"), ("seq_lora", "rows")):
        with pytest.raises(ConfigError, match=f"memory is {memory}, but strategy {strategy} does not heed it"):
            choose_strategy(spec(strategy=strategy, memory=memory), None)
    choose_strategy(spec(strategy="seq_lora", memory="none"), None)


def test_options_that_the_lineages_strategy_does_not_take_are_refused() -> None:
    """A spec without a strategy does not know it when it is read."""
    read = spec(strategy_options={"weight": 3})
    with pytest.raises(ConfigError, match=r"Strategy 'deal' has no option 'weight'; it takes none\."):
        choose_strategy(read, None)


@pytest.mark.parametrize(
    ("before", "given", "memory"),
    [
        ("rows", {}, "rows"),
        ("rows", {"rehearsal": {"rows_per_step": 2}}, "rows"),
        ("rows", {"memory": "none"}, "none"),
        ("rows", {"rehearsal": {"texts": "stored"}}, None),
        ("rows", {"strategy": "seq_lora"}, None),
        ("rows", {"strategy": "replay"}, "rows"),
        ("tests", {}, "tests"),
        ("tests", {"strategy": "replay"}, None),
        ("none", {}, "none"),
        (None, {}, None),
        ("new", {}, "tests"),
        ("new", {"memory": "none"}, "none"),
        ("new", {"strategy": "seq_lora"}, None),
        ("new", {"rehearsal": {"temperature": 2.0}}, None),
        ("new", {"rehearsal": {"texts": "stored"}}, None),
    ],
)
def test_a_lineage_keeps_its_memory_until_a_spec_chooses(
    before: Memory | Literal["new"] | None, given: dict[str, Any], memory: Memory | None
) -> None:
    found = with_memory_of(spec(**given), None if before == "new" else record(before))
    assert found.memory == memory
    assert found.method.rehearsal.keeps_rows == (memory == "rows" or "texts" in given.get("rehearsal", {}))


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
    earlier = {**before, "memory": "rows", "rehearsal": {**before["rehearsal"], "texts": "both"}}
    (note,) = changed_settings(longer.model_copy(update={"memory": "tests"}), earlier, "4")
    assert note.endswith('memory "tests" (before: "rows")'), "and not what that stands for"
    (note,) = changed_settings(longer, {**earlier, "memory": None}, "4")
    assert note.endswith('rehearsal.texts "arrival" (before: "both")')
    del before["gate"], before["train"]["num_epochs"]
    assert changed_settings(spec(), before, "4") == (), "an old spec may lack a setting"
    (note,) = changed_settings(
        spec(
            train=dict.fromkeys(("num_epochs", "max_steps", "batch_size", "seed"), 7),
            evaluate={"max_new_tokens": 7},
            rehearsal={"num_texts": 7, "rows_per_step": 7},
        ),
        spec().model_dump(mode="json"),
        "1",
    )
    assert note.count("before") == 6 and note.endswith(", and 1 more")


@pytest.mark.parametrize(
    ("before", "given", "spared"),
    [
        (None, {"memory": "tests"}, "all"),
        (None, {"memory": "none"}, None),
        (None, {"memory": "none", "train": {"recentre_steps": 5}}, "labelled"),
        (None, {"strategy": "seq_lora"}, None),
        ("all", {"memory": "rows"}, "all"),
        ("all", {"memory": "rows", "train": {"recentre_steps": 5}}, "all"),
        ("labelled", {"memory": "tests"}, "all"),
    ],
)
def test_rows_that_a_version_spared_stay_spared(before: Spared, given: dict[str, Any], spared: Spared) -> None:
    """Later versions continue what the texts taught."""
    parents = before and LineageRecord.from_json({**RECORD.to_json(), "spared": before})
    assert choose_spared(spec(**given), given.get("strategy", "deal"), parents or None) == spared
