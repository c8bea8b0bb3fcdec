"""Merge the settings of a run: options win over the spec, the spec over the lineage's file, the file over defaults."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator

from deal_core.base_model.sources import DEFAULT_BASE
from deal_core.config import AdapterConfig
from deal_core.errors import ConfigError
from infra.store.base import ObjectStore
from infra.store.keys import settings_key
from tasks.context import current_store
from tasks.lineage.record import LineageRecord
from tasks.lineage.settings import DEFAULT, WatchedLineage, stored_values
from tasks.references import Arrival
from tasks.spec import DEFAULT_STRATEGY, AdaptSpec, LineageSpec, parse, read_lineage_values, resolve_base

Asked = TypeVar("Asked", bound=LineageSpec)


def spec_from_options(
    store: ObjectStore, path: Path | None, *,
    task: str | None, data: str | None, test_data: str | None, **lineage_options: str | None,
) -> AdaptSpec:
    """The spec of one adaptation from a command's options, its spec file and the lineage's file.

    Raises:
        ConfigError: neither a spec nor both of task and data are given, or something does not fit.
    """
    arrival = _given({"name": task, "data": data, "test_data": test_data})
    if path is None and not (task and data):
        raise ConfigError("Give a spec file, or both --task NAME and --data FILE.")
    if path is not None and arrival:
        raise ConfigError("Give either a spec file or --task, --data and --test-data, not both.")
    said = {"task": arrival} if path is None else read_lineage_values(path)
    spec = _parse_over_stored(AdaptSpec, store, said, lineage_options, path)
    return spec.with_files_from(Path(os.path.realpath(path)).parent if path else Path.cwd())


def watched_from_options(
    store: ObjectStore, path: Path | None, *, tasks: Sequence[str] | None, **lineage_options: str | None
) -> WatchedLineage:
    """What a watch is about, from a command's options, its spec file (a task in it is left out) and the lineage's file.

    Raises:
        ConfigError: something does not fit.
    """
    said = read_lineage_values(path) if path else {}
    said.pop("task", None)
    return _parse_over_stored(WatchedLineage, store, said, {**lineage_options, "tasks": tasks}, path)


def _parse_over_stored(
    model: type[Asked], store: ObjectStore, said: Mapping[str, Any], options: Mapping[str, Any], path: Path | None
) -> Asked:
    """Check `options` over what is `said` over the lineage's file; a relative base in the options is the caller's.

    Raises:
        ConfigError: something does not fit; the message begins with where it was said.
    """
    given = _given(options)
    if "base_model" in given:
        given["base_model"] = resolve_base(given["base_model"], Path.cwd())
    origin = str(path or "options")
    lineage = given.get("lineage", said.get("lineage", DEFAULT))
    stored = stored_values(store, lineage)
    if stored:
        origin += f" over {store.uri_of(settings_key(lineage))}"
    values = _over(stored, said, model)
    if path is not None:
        parse(model, values, origin)
    return parse(model, {**values, **given}, "options" if path else origin)


def _over(stored: Mapping[str, Any], said: Mapping[str, Any], model: type[LineageSpec]) -> dict[str, Any]:
    """`said` over what the lineage's file says for `model`; a section that both have is merged key by key."""
    merged = {name: value for name, value in stored.items() if name in model.model_fields}
    for name, value in said.items():
        below = merged.get(name)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            merged[name] = {**below, **value}
        else:
            merged[name] = value
    return merged


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _fill_in(spec: Any) -> Any:
    """What a run on a server is given, over the lineage's file; an AdaptSpec is complete."""
    if not isinstance(spec, Mapping):
        return spec
    return _over(stored_values(current_store(), spec.get("lineage", DEFAULT)), spec, AdaptSpec)


AskedSpec = Annotated[AdaptSpec, BeforeValidator(_fill_in)]
"""A spec as a flow's parameter: what it does not say comes from the lineage's file when the run starts."""


def arrival_of(spec: AdaptSpec) -> Arrival:
    """The arrival that a spec is about."""
    task = spec.task
    return Arrival(task=task.name, data=task.data, test_data=task.test_data, given=task.given())


def choose_base(spec: AdaptSpec, record: LineageRecord | None) -> str:
    """The base model that is asked for, else the lineage's own, else the default."""
    return spec.base_model or (record.base.source if record else DEFAULT_BASE)


def choose_adapter(spec: AdaptSpec, record: LineageRecord | None) -> AdapterConfig:
    """The adapter's shape that is asked for, else the lineage's own, else the default.

    Raises:
        ConfigError: another shape is asked for than the lineage's adapter has.
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
    """The strategy that is asked for, else the lineage's own, else the default."""
    return spec.strategy or (record.strategy if record else DEFAULT_STRATEGY)


def settings_of(spec: AdaptSpec, adapter: AdapterConfig, strategy: str) -> dict[str, Any]:
    """The settings of a run, for its log."""
    parts = {"deal", "rehearsal", "rivals", "train", "evaluate", "data", "gate"}
    settings = spec.model_dump(mode="json", include=parts)
    return {**settings, "adapter": asdict(adapter), "strategy": strategy}
