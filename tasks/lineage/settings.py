"""The settings of lineages and runs.

Each lineage has a file in the store, `lineages/NAME.yaml`. For a run, options win over the spec, the spec over the
lineage's file, and the file over the defaults.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import yaml
from pydantic import model_validator

from deal_core.data.schema import is_name
from deal_core.errors import ConfigError, RegistryError, in_one_line
from deal_core.safe_text import brief
from deal_core.yaml_file import MAX_BYTES, yaml_mapping
from infra.lineage_state import read_state, update
from infra.store import keys
from infra.store.base import ObjectNotFoundError, ObjectStore, UnusableObjectError
from infra.versions import Versions
from tasks.lineage.consolidation import NEVER, ConsolidatePolicy
from tasks.lineage.retrain import DEFAULT_POLICY, RetrainPolicy
from tasks.spec import AdaptSpec, LineageSpec, Name, parse, read_lineage_values, resolve_base

DEFAULT = "default"
Asked = TypeVar("Asked", bound=LineageSpec)


class WatchedLineage(LineageSpec):
    """A lineage that learns from files in the inbox."""

    tasks: tuple[Name, ...] = ()
    """The tasks that the lineage learns; empty: every task of the inbox."""
    retrain: RetrainPolicy = DEFAULT_POLICY
    """When the lineage is trained on what has landed."""
    consolidate: ConsolidatePolicy = NEVER
    """When all that was learned is learned again, together."""

    @model_validator(mode="after")
    def _check_budget(self) -> Self:
        if self.consolidate.when_spent and self.gate.max_total_drop_points is None:
            raise ValueError("consolidate.when_spent needs gate.max_total_drop_points, the budget that may be spent")
        return self


class LineageWithPause(WatchedLineage):
    """The settings of a lineage, and whether it learns."""

    held: str | None = None
    """Why the lineage learns nothing that lands; None: it learns."""


def with_pause(store: ObjectStore, lineage: WatchedLineage) -> LineageWithPause:
    """Return the settings of a lineage, and whether it learns."""
    return LineageWithPause.model_construct(**vars(lineage), held=read_state(store, lineage.lineage).paused)


def read_lineage(store: ObjectStore, lineage: str) -> WatchedLineage:
    """Read the settings of a lineage that learns from the inbox: its file, or the defaults if it needs none.

    Raises:
        ConfigError: It does not learn from the inbox, or a setting is not valid.
    """
    settings = stored_lineage(store, lineage)
    if settings is None and lineage not in learning_lineages(store):
        uri = store.uri_of(keys.settings_key(lineage))
        raise ConfigError(f"There is no {uri}; add the lineage with: deal lineage apply SPEC.")
    return settings or WatchedLineage(lineage=lineage)


def stored_lineage(store: ObjectStore, lineage: str) -> WatchedLineage | None:
    """Read a lineage's file; None: there is none. ConfigError: a setting is not valid."""
    values = _read_values(store, lineage)
    return None if values is None else parse(WatchedLineage, values, store.uri_of(keys.settings_key(lineage)))


def _stored_values(store: ObjectStore, lineage: Any) -> dict[str, Any]:
    """Return the values in a lineage's file, with its name; empty if there is no file or `lineage` is not a name."""
    values = _read_values(store, lineage) if isinstance(lineage, str) and is_name(lineage) else None
    if values is None:
        return {}
    parse(WatchedLineage, values, store.uri_of(keys.settings_key(lineage)))
    return values


def _read_values(store: ObjectStore, lineage: str) -> dict[str, Any] | None:
    """Return the mapping in a lineage's file; None: there is no file."""
    uri = store.uri_of(keys.settings_key(lineage))
    try:
        values = yaml_mapping(store.get_bytes(keys.settings_key(lineage), at_most=MAX_BYTES + 1), uri)
    except ObjectNotFoundError:
        return None
    except UnusableObjectError as error:
        raise ConfigError(str(error)) from None
    if values.setdefault("lineage", lineage) != lineage:
        raise ConfigError(f"{uri} is about lineage {brief(values['lineage'])}; name the file after it.")
    return values


class Lineages(NamedTuple):
    """The lineages with valid files, and the problem of each other file."""

    good: list[WatchedLineage]
    problems: dict[str, str]
    """One line, by lineage."""


def list_settings(store: ObjectStore) -> list[str]:
    """Return the names of the lineages with a file, in alphabetical order."""
    names = [keys.file_name(info.key) for info in store.list(keys.LINEAGES)]
    return [name.removesuffix(".yaml") for name in names if name.endswith(".yaml")]


def learning_lineages(store: ObjectStore) -> list[str]:
    """Return the names of the lineages that learn from the inbox, in alphabetical order.

    They are those with a file. While no lineage has one, all that have a version learn, or "default" in an empty store.
    """
    return list_settings(store) or list(Versions(store).lineages()) or [DEFAULT]


def only_lineage(store: ObjectStore) -> str:
    """Return the lineage that is meant where none is named: the store's only one, or "default" in an empty store.

    Raises:
        ConfigError: The store has several lineages.
    """
    names = sorted({*list_settings(store), *Versions(store).lineages()})
    if len(names) > 1:
        raise ConfigError(f"There are several lineages ({', '.join(names)}); give --lineage NAME, or set DEAL_LINEAGE.")
    return names[0] if names else DEFAULT


def require_any_lineage(store: ObjectStore) -> None:
    """Refuse a store in which nothing was learned and no lineage has a file.

    Raises:
        RegistryError: It says what to do first.
    """
    if not has_lineage(store):
        raise RegistryError(
            "Nothing is learned here yet; learn a file with: deal adapt --task NAME --data FILE, try: deal demo, or "
            "name another home with --home."
        )


def has_lineage(store: ObjectStore) -> bool:
    """Return whether a lineage has a version or a file. Of many versions only the first are listed."""
    return bool(list_settings(store)) or any(info.key.count("/") == 2 for info in store.list(keys.VERSIONS))


def read_lineages(store: ObjectStore) -> Lineages:
    """Read the settings of all lineages that learn from the inbox, in alphabetical order."""
    lineages = Lineages([], {})
    for name in learning_lineages(store):
        try:
            lineages.good.append(read_lineage(store, name))
        except Exception as error:  # whatever it is, it holds up no other lineage
            lineages.problems[name] = in_one_line(error)
    return lineages


def list_lineages(store: ObjectStore) -> list[WatchedLineage]:
    """Return the lineages that learn from the inbox. Each problem of a lineage's file is logged once."""
    lineages = read_lineages(store)
    for name, problem in lineages.problems.items():
        store.warn_once(f"{name} {problem}", f"Lineage {name} is left out: {problem}")
    return lineages.good


def add_lineage(store: ObjectStore, lineage: WatchedLineage, values: Mapping[str, Any] | None = None) -> str:
    """Write or replace a lineage's file; return its address.

    `values` are what the lineage was read from. Settings that are not among them are not written, so that later
    releases' defaults reach the lineage.
    """
    chosen = lineage.model_dump(mode="json", exclude_unset=True)
    for section, stated in (values or {}).items():
        if isinstance(stated, Mapping) and isinstance(chosen.get(section), dict):
            chosen[section] = {name: value for name, value in chosen[section].items() if name in stated}
    return _write_values(store, lineage.lineage, chosen)


def _write_values(store: ObjectStore, lineage: str, values: Mapping[str, Any]) -> str:
    text = yaml.safe_dump({"lineage": lineage, **values}, sort_keys=False, allow_unicode=True)
    store.put_bytes(keys.settings_key(lineage), text.encode())
    return store.uri_of(keys.settings_key(lineage))


def pause_lineage(store: ObjectStore, lineage: str, why: str | None) -> LineageWithPause:
    """Let a lineage learn nothing that lands, for the reason `why`; with None, let it learn again.

    Raises:
        ConfigError: The lineage has no valid file, or learns nothing anyway.
    """
    settings = read_lineage(store, lineage)  # it checks the file
    update(store, lineage, lambda state: state.model_copy(update={"paused": why}))
    return with_pause(store, settings)


def leave_base_open(store: ObjectStore, lineage: str) -> bool:
    """Remove the base model from a lineage's file, if it is there, so that the champion's base model counts.

    Return whether it was there.
    """
    values = _read_values(store, lineage)
    if values is None or "base_model" not in values:
        return False
    del values["base_model"]
    _write_values(store, lineage, values)
    return True


def remove_lineage(store: ObjectStore, lineage: str) -> str:
    """Delete a lineage's file, so that it learns no longer from the inbox; return its address. Versions stay.

    Raises:
        ConfigError: There is no file, or it is the only one.
    """
    key = keys.settings_key(lineage)
    if not store.exists(key):
        raise ConfigError(f"There is no {store.uri_of(key)}; deal lineage list shows the lineages.")
    if list_settings(store) == [lineage]:
        raise ConfigError(
            f"'{lineage}' is the only lineage with settings. Without any, all lineages learn everything. "
            f"To stop the learning, use: deal lineage pause {lineage}."
        )
    store.delete(key)
    update(store, lineage, lambda state: state.model_copy(update={"paused": None}))
    return store.uri_of(key)


def spec_from_options(
    store: ObjectStore,
    path: Path | None,
    *,
    task: str | None,
    data: str | None,
    test_data: str | None,
    lineage: str | None = None,
    settings: Sequence[str] = (),
) -> AdaptSpec:
    """Make the spec of one adaptation from a command's options, its spec file and the lineage's file.

    `settings` are texts KEY=VALUE, as in `train.num_epochs=1`; see `parse_settings`.

    Raises:
        ConfigError: There is neither a spec file nor both a task and data, or a setting is not valid.
    """
    given = {"name": task, "data": data, "test_data": test_data}
    arrival = {name: value for name, value in given.items() if value is not None}
    if path is None and not (task and data):
        raise ConfigError("Give a spec file, or both --task NAME and --data FILE.")
    if path is not None and arrival:
        raise ConfigError("Give either a spec file or --task, --data and --test-data, not both.")
    values = {"task": arrival} if path is None else read_lineage_values(path)
    spec = _parse_over_stored(AdaptSpec, store, values, path, settings, lineage=lineage)
    return spec.with_files_from(Path(os.path.realpath(path)).parent if path else Path.cwd())


def spec_from_values(store: ObjectStore, values: Mapping[str, Any], *, lineage: str, **options: Any) -> AdaptSpec:
    """Make the spec of one adaptation from values as a spec file would have them, over the lineage's file.

    `options` win over the values; one that is None was not given. Relative paths are relative to the working folder.

    Raises:
        ConfigError: A setting is not valid.
    """
    spec = _parse_over_stored(AdaptSpec, store, values, None, (), lineage=lineage, **options)
    return spec.with_files_from(Path.cwd())


def watched_from_options(
    store: ObjectStore,
    path: Path | None,
    *,
    tasks: Sequence[str] | None,
    lineage: str | None = None,
    settings: Sequence[str] = (),
) -> WatchedLineage:
    """Make the settings of a watch from a command's options, its spec file without the task, and the lineage's file."""
    values = read_lineage_values(path) if path else {}
    values.pop("task", None)
    return _parse_over_stored(WatchedLineage, store, values, path, settings, lineage=lineage, tasks=tasks)


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """Read texts such as `train.num_epochs=1` into nested settings. A value is read as YAML.

    Raises:
        ConfigError: A text is no setting, or two of them contradict each other.
    """
    values: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        names = key.split(".")
        if not equals or not all(names):
            raise ConfigError(f"--set is {brief(setting)}; give KEY=VALUE, such as train.num_epochs=1.")
        value = yaml_mapping(f"value: {text}".encode("utf-8", "surrogateescape"), f"--set {brief(setting)}")["value"]
        section = values
        for name in names[:-1]:
            section = section.setdefault(name, {})
            if not isinstance(section, dict):
                raise ConfigError(f"--set gives {name} both a value and {key}; give one of them.")
        section[names[-1]] = value
    return values


def _parse_over_stored(
    model: type[Asked],
    store: ObjectStore,
    values: Mapping[str, Any],
    path: Path | None,
    settings: Sequence[str],
    **options: Any,
) -> Asked:
    """Parse the options and settings of a command over the spec's values over the lineage's file.

    An option that is None was not given. A relative base model in the settings is relative to the working folder.
    """
    stated = parse_settings(settings) | {name: value for name, value in options.items() if value is not None}
    if isinstance(stated.get("base_model"), str):
        stated["base_model"] = resolve_base(stated["base_model"], Path.cwd())
    origin = str(path or "options")
    lineage = stated.get("lineage", values.get("lineage")) or only_lineage(store)
    stated.setdefault("lineage", lineage)
    stored = _stored_values(store, lineage)
    if stored:
        origin += f" over {store.uri_of(keys.settings_key(lineage))}"
    merged = _over(stored, values, model)
    if path is not None:  # a mistake in the file is not one of the options
        parse(model, merged, origin)
    return parse(model, _over(merged, stated, model), "options" if path else origin)


def _over(stored: Mapping[str, Any], values: Mapping[str, Any], model: type[LineageSpec]) -> dict[str, Any]:
    """Put `values` over the stored values that `model` has. A section in both is merged key by key."""
    merged = {name: value for name, value in stored.items() if name in model.model_fields}
    for name, value in values.items():
        below = merged.get(name)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            value = {**below, **value}
        merged[name] = value
    return merged


def over_stored(store: ObjectStore, values: Mapping[str, Any]) -> dict[str, Any]:
    """Put the values of an arrival's spec over those of the lineage's file."""
    return _over(_stored_values(store, values.get("lineage", DEFAULT)), values, AdaptSpec)
