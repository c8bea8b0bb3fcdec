"""What a run takes from its lineage where its spec leaves the choice: base model, adapter, strategy and memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from deal_core.base_model.sources import DEFAULT_BASE
from deal_core.config import AdapterConfig
from deal_core.errors import ConfigError
from deal_core.method_config import DEFAULT_MEMORY, MEMORY, MethodConfig
from deal_core.strategies import OWN, strategy_class
from tasks.lineage.record import LineageRecord
from tasks.references import Spared
from tasks.spec import DEFAULT_STRATEGY, AdaptSpec

LOGGED_PARTS = ("memory", "deal", "rehearsal", "strategy_options", "selection", "train", "evaluate", "data", "gate")
"""Parts of a spec that a run's log shows."""
MAX_NAMED = 6
"""Most settings that a note about changed settings names."""
SAME_RESULT = {"data.include_texts", "data.retain_training_rows", "train.num_processes", "train.checkpoint_steps"}
"""Settings that such a note leaves out: they change no version. What `memory` stands for is left out too."""


def choose_base(spec: AdaptSpec, record: LineageRecord | None) -> str:
    """Return the spec's base model, or else the lineage's, or else the default."""
    return spec.base_model or (record.base.source if record else DEFAULT_BASE)


def choose_adapter(spec: AdaptSpec, record: LineageRecord | None) -> AdapterConfig:
    """Return the adapter's shape of the spec, or else of the lineage, or else the default.

    Raises:
        ConfigError: The spec and the lineage have different shapes.
    """
    if record is None:
        return spec.adapter or AdapterConfig()
    if spec.adapter is not None and spec.adapter != record.adapter:
        raise ConfigError(
            f"The adapter of lineage '{record.lineage}' has the shape {record.adapter}, the spec asks for "
            f"{spec.adapter}; leave adapter out of the spec, or start a new lineage with --lineage."
        )
    return record.adapter


def choose_strategy(spec: AdaptSpec, record: LineageRecord | None) -> str:
    """Return the spec's strategy, or else the lineage's, or else the default.

    Raises:
        ConfigError: The strategy does not take the spec's memory or its options.
    """
    strategy = spec.strategy or (record.strategy if record else DEFAULT_STRATEGY)
    strategy_class(strategy).options_of(MethodConfig(strategy_options=spec.strategy_options))
    if spec.memory and spec.memory not in strategy_class(strategy).memories:
        raise ConfigError(
            f"memory is {spec.memory}, but strategy {strategy} does not heed it; leave memory out, or take the "
            f"strategy {' or '.join(name for name in OWN if spec.memory in strategy_class(name).memories)}."
        )
    return strategy


def with_memory_of(spec: AdaptSpec, record: LineageRecord | None) -> AdaptSpec:
    """Return the spec with the lineage's memory, or with the default of a new lineage, if the spec does not choose.

    A spec chooses with `memory`, with the settings of the rehearsal that `memory` stands for, or with a strategy that
    does not heed that memory. A lineage that was made without a memory stays without.
    """
    by_default = DEFAULT_MEMORY if spec.rehearsal.temperature == 1 else None  # re-centred answers have no temperature
    memory = record.memory if record else by_default
    if memory is None or spec.memory is not None or spec.rehearsal.decides_memory:
        return spec
    heeded = strategy_class(choose_strategy(spec, record)).memories
    return spec.model_copy(update={"memory": memory}) if memory in heeded else spec


def choose_spared(spec: AdaptSpec, strategy: str, record: LineageRecord | None) -> Spared:
    """Return the tasks whose test rows may teach this version or taught one before it, and so do not judge it."""
    spared = record.spared if record else None
    if strategy_class(strategy).old_rows(spec.method) == "unused":
        return "all"
    return spared or ("labelled" if spec.train.recentre_steps else None)


def changed_settings(spec: AdaptSpec, before: Mapping[str, Any], version: str) -> tuple[str, ...]:
    """Return a note about settings that differ from those with which the parent version was learned; none if all agree.

    Options without a spec have the defaults, and a person may not expect that.

    Args:
        spec: The spec of the run.
        before: The spec of the parent's run as it was stored. Settings that only one of the two has are left out.
        version: The parent's number.
    """

    def shown(settings: Mapping[str, Any]) -> dict[str, str]:
        parts = {
            part: values for part, values in settings.items() if part in LOGGED_PARTS and isinstance(values, Mapping)
        }
        named = {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}
        named = {"memory": settings.get("memory"), **named}
        return {name: json.dumps(value, ensure_ascii=False) for name, value in named.items()}

    now, then = shown(spec.model_dump(mode="json")), shown(before)
    by_memory = {f"rehearsal.{name}" for name in MEMORY["rows"]} if spec.memory and before.get("memory") else set()
    changed = [
        f"{name} {value} (before: {then[name]})"
        for name, value in now.items()
        if name not in SAME_RESULT | by_memory and then.get(name, value) != value
    ]
    if not changed:
        return ()
    more = f", and {len(changed) - MAX_NAMED} more" if len(changed) > MAX_NAMED else ""
    return (f"settings that differ from version {version}'s: {', '.join(changed[:MAX_NAMED])}{more}",)


def settings_of(spec: AdaptSpec, adapter: AdapterConfig, strategy: str) -> dict[str, Any]:
    """Return the settings of a run for its log."""
    settings = spec.model_dump(mode="json", include=set(LOGGED_PARTS))
    return {**settings, "adapter": asdict(adapter), "strategy": strategy}
