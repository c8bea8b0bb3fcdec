"""Settings: each field's limits hold in Python and in a spec, are shown in its schema, and change no digest."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import pytest

from deal_core.config import AdapterConfig, DataConfig, EvaluateConfig, TrainConfig
from deal_core.data.order import BucketSampler
from deal_core.errors import ConfigError
from deal_core.judging_config import GateConfig
from deal_core.limits import MAX_SEED
from deal_core.method_config import DealConfig, RehearsalConfig
from tasks.spec import AdaptSpec, parse

TASK = {"name": "t", "data": "x"}
SECTIONS = {
    "adapter": AdapterConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "data": DataConfig,
    "gate": GateConfig,
    "deal": DealConfig,
    "rehearsal": RehearsalConfig,
}
OPTIONAL = {
    "adapter.alpha": 32.0,
    "train.max_steps": 3,
    "train.learning_rate": 1e-3,
    "train.max_answer_tokens": 50,
    "gate.min_accuracy": 0.5,
    "gate.max_old_slice_drop_points": 5.0,
    "gate.max_total_drop_points": 5.0,
    "gate.rollout_share": 0.5,
}
WRONG: dict[type, list[Any]] = {
    float: [math.nan, math.inf, -math.inf, True, "3", [1.0], {}, 10**400],
    int: [True, "3", 1.5, 3.0, math.nan, math.inf, [1], 10**400],
    bool: [1, 0, "true", "yes", None, 1.0],
    str: [1, True, None, ["none"], "nonesuch"],
    tuple: ["q", 1, {"q": 1}, [None], [["q"]]],
}
VALUES = [
    (section, each.name, OPTIONAL.get(f"{section}.{each.name}", each.default))
    for section, cls in SECTIONS.items()
    for each in fields(cls)
    if f"{section}.{each.name}" != "adapter.target_modules"
] + [("adapter", "target_modules", ("q",))]
NUMBERS = [value for value in VALUES if type(value[2]) in (int, float)]
SCHEMA = AdaptSpec.model_json_schema()["$defs"]


@pytest.mark.parametrize(("section", "name", "good"), VALUES, ids=lambda value: str(value)[:30])
def test_a_value_of_another_type_or_without_end_is_refused(section: str, name: str, good: Any) -> None:
    kind = type(good)
    assert kind in WRONG, "every field has a default of a known type"
    for wrong in WRONG[kind]:
        with pytest.raises(ConfigError, match=rf"{section}\.{name}") as caught:
            SECTIONS[section](**{name: wrong})
        assert len(str(caught.value)) < 400
        with pytest.raises(ConfigError, match=rf"a\.yaml: .*{section}\.{name}") as caught:
            parse(AdaptSpec, {"task": TASK, section: {name: wrong}}, "a.yaml")
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize(("section", "name", "good"), NUMBERS, ids=lambda value: str(value)[:30])
def test_a_number_has_a_limit_that_its_schema_shows(section: str, name: str, good: Any) -> None:
    schema = SCHEMA[SECTIONS[section].__name__]["properties"][name]
    shown = next(each for each in (schema, *schema.get("anyOf", ())) if each.get("type") in ("integer", "number"))
    if shown["type"] == "integer":
        assert {"minimum", "maximum"} <= shown.keys()
    else:
        unbounded = ("min_gain_points", "min_gain_over_champion_points")
        assert name in unbounded or {"minimum", "exclusiveMinimum"} & shown.keys()
    for bound, outside in (("minimum", -1), ("maximum", 1), ("exclusiveMinimum", 0), ("exclusiveMaximum", 0)):
        if bound in shown:
            with pytest.raises(ConfigError, match=rf"{section}\.{name} is .*; give "):
                SECTIONS[section](**{name: type(good)(shown[bound] + outside)})


def test_the_largest_seed_orders_rows() -> None:
    sampler = BucketSampler([3] * 9, 2, MAX_SEED)
    sampler.set_epoch(1000)
    assert sorted(sampler) == [*range(9)]


@pytest.mark.parametrize("value", [True, 1.0, "1", 2])
def test_a_schema_version_is_a_whole_number(value: Any) -> None:
    with pytest.raises(ConfigError, match="schema_version"):
        parse(AdaptSpec, {"task": TASK, "schema_version": value}, "a")
