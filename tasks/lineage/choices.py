"""What a run takes from its lineage where its spec leaves the choice: base model, adapter and strategy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from deal_core.base_model.sources import DEFAULT_BASE
from deal_core.config import NOT_DECIDING, AdapterConfig
from deal_core.errors import ConfigError
from deal_core.method_config import MethodConfig
from deal_core.strategies import strategy_class
from tasks.lineage.record import LineageRecord
from tasks.spec import DEFAULT_STRATEGY, AdaptSpec

LOGGED_PARTS = ("deal", "rehearsal", "strategy_options", "selection", "train", "evaluate", "data", "gate")
"""Parts of a spec that a run's log shows."""
MAX_NAMED = 6
"""Most settings that a note about changed settings names."""
SAME_RESULT = {"data.include_texts", "data.retain_training_rows", "train.checkpoint_steps"}
SAME_RESULT |= {f"train.{name}" for name in NOT_DECIDING}
"""Settings that such a note leaves out: they change no version."""


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
        ConfigError: The strategy does not take the spec's options.
    """
    strategy = spec.strategy or (record.strategy if record else DEFAULT_STRATEGY)
    strategy_class(strategy).options_of(MethodConfig(strategy_options=spec.strategy_options))
    return strategy


def changed_settings(spec: AdaptSpec, before: Mapping[str, Any], version: str) -> tuple[str, ...]:
    """Return a note about settings that differ from those with which the parent version was learned; none if all agree.

    Options without a spec have the defaults, and a person may not expect that. `before` is the parent's spec as it was
    stored, `version` the parent's number. Settings that only one of the two specs has are left out.
    """

    def shown(settings: Mapping[str, Any]) -> dict[str, str]:
        parts = {
            part: values for part, values in settings.items() if part in LOGGED_PARTS and isinstance(values, Mapping)
        }
        named = {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}
        return {name: json.dumps(value, ensure_ascii=False) for name, value in named.items()}

    now, then = shown(spec.model_dump(mode="json")), shown(before)
    changed = [
        f"{name} {value} (before: {then[name]})"
        for name, value in now.items()
        if name not in SAME_RESULT and then.get(name, value) != value
    ]
    if not changed:
        return ()
    more = f", and {len(changed) - MAX_NAMED} more" if len(changed) > MAX_NAMED else ""
    return (f"settings that differ from version {version}'s: {', '.join(changed[:MAX_NAMED])}{more}",)


def settings_of(spec: AdaptSpec, adapter: AdapterConfig, strategy: str) -> dict[str, Any]:
    """Return the settings of a run for its log."""
    settings = spec.model_dump(mode="json", include=set(LOGGED_PARTS))
    return {**settings, "adapter": asdict(adapter), "strategy": strategy}
