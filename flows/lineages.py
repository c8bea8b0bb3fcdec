"""The lineages that a server looks after: one file each in the store, `lineages/<name>.yaml`."""

from __future__ import annotations

import logging

import yaml

from deal_core.errors import ConfigError
from flows.screens import in_one_line
from flows.spec import LineageSpec, Name, parse
from infra.object_store import ObjectStore

logger = logging.getLogger(__name__)
FOLDER = "lineages"
DEFAULT = "default"


class WatchedLineage(LineageSpec):
    """A lineage that learns from what lands, without anybody asking."""

    tasks: tuple[Name, ...] = ()
    """It learns these tasks alone; none: every task of the inbox."""


def key_of(lineage: str) -> str:
    """Where a lineage's file lies."""
    return f"{FOLDER}/{lineage}.yaml"


def read_lineage(store: ObjectStore, lineage: str) -> WatchedLineage:
    """The file of a lineage; the defaults for a lineage called "default" that has none.

    Raises:
        ConfigError: there is no such lineage, or its file does not fit.
    """
    key = key_of(lineage)
    if not store.exists(key):
        if lineage == DEFAULT:
            return WatchedLineage()
        raise ConfigError(f"There is no {store.uri_of(key)}; add the lineage with: deal lineage add SPEC.")
    try:
        values = yaml.safe_load(store.get_bytes(key).decode("utf-8")) or {}
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{store.uri_of(key)} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{store.uri_of(key)} holds no mapping of keys; see examples/ for a spec.")
    if values.setdefault("lineage", lineage) != lineage:
        raise ConfigError(f"{store.uri_of(key)} is about lineage {values['lineage']!r}; name the file after it.")
    return parse(WatchedLineage, values, store.uri_of(key))


def list_lineages(store: ObjectStore) -> list[WatchedLineage]:
    """Every lineage there is a file for, by name; the default one where there is none.

    A file that does not fit is logged and passed over, so that it does not hold up the others.
    """
    names = [info.key.removeprefix(f"{FOLDER}/") for info in store.list(FOLDER)]
    names = [name.removesuffix(".yaml") for name in names if name.endswith(".yaml") and "/" not in name]
    found = []
    for name in names or [DEFAULT]:
        try:
            found.append(read_lineage(store, name))
        except ConfigError as error:
            logger.error("Lineage %s is not looked after: %s", name, in_one_line(error))
    return found


def add_lineage(store: ObjectStore, lineage: WatchedLineage) -> str:
    """Write a lineage's file, or replace it; return its address."""
    given = lineage.model_dump(mode="json", exclude_unset=True)
    text = yaml.safe_dump({"lineage": lineage.lineage, **given}, sort_keys=False, allow_unicode=True)
    store.put_bytes(key_of(lineage.lineage), text.encode())
    return store.uri_of(key_of(lineage.lineage))
