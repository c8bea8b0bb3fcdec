"""The settings of lineages: one file each in the store, `lineages/<name>.yaml`. A server looks after those."""

from __future__ import annotations

import logging
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import yaml

from deal_core.errors import ConfigError, in_one_line
from deal_core.printable import brief
from deal_core.yaml_file import MAX_BYTES, yaml_mapping
from infra.store import keys
from infra.store.base import ObjectNotFoundError, ObjectStore, UnusableObjectError
from tasks.progress import Interrupted
from tasks.spec import NAME_PATTERN, LineageSpec, Name, parse

logger = logging.getLogger(__name__)
DEFAULT = "default"
_logged: dict[str, str] = {}

Found = TypeVar("Found")


class WatchedLineage(LineageSpec):
    """A lineage that learns from what lands."""

    tasks: tuple[Name, ...] = ()
    """It learns these tasks alone; none: every task of the inbox."""


def read_lineage(store: ObjectStore, lineage: str) -> WatchedLineage:
    """The file of a lineage; the defaults for a lineage called "default" that has none.

    Raises:
        ConfigError: there is no such lineage, or its file does not fit.
    """
    uri = store.uri_of(keys.settings_key(lineage))
    values = _read_values(store, lineage)
    if values is None:
        if lineage == DEFAULT:
            return WatchedLineage()
        raise ConfigError(f"There is no {uri}; add the lineage with: deal lineage add SPEC.")
    return parse(WatchedLineage, values, uri)


def stored_values(store: ObjectStore, lineage: Any) -> dict[str, Any]:
    """What a lineage's file says, the lineage's name included; nothing where there is none, or `lineage` is no name.

    Raises:
        ConfigError: the file does not fit.
    """
    if not (isinstance(lineage, str) and re.fullmatch(NAME_PATTERN, lineage)):
        return {}
    values = _read_values(store, lineage)
    if values is None:
        return {}
    parse(WatchedLineage, values, store.uri_of(keys.settings_key(lineage)))
    return values


def _read_values(store: ObjectStore, lineage: str) -> dict[str, Any] | None:
    """The mapping in a lineage's file; None where there is no file.

    Raises:
        ConfigError: it is no mapping, or about another lineage.
    """
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
    """What the files say, and what is wrong with those that do not fit."""

    good: list[WatchedLineage]
    problems: dict[str, str]
    """One line, by lineage."""


def read_lineages(store: ObjectStore) -> Lineages:
    """Every lineage there is a file for, by name; the default one where there is none."""
    names = [keys.file_name(info.key) for info in store.list(keys.LINEAGES)]
    names = [name.removesuffix(".yaml") for name in names if name.endswith(".yaml") and "/" not in name]
    found = Lineages([], {})
    for name in names or [DEFAULT]:
        try:
            found.good.append(read_lineage(store, name))
        except ConfigError as error:
            found.problems[name] = in_one_line(error)
    return found


def list_lineages(store: ObjectStore) -> list[WatchedLineage]:
    """The lineages whose files fit; of the others each problem is logged once, and `deal status` shows it."""
    found = read_lineages(store)
    for name, problem in found.problems.items():
        if _logged.get(name) != problem:
            logger.error("Lineage %s is not looked after: %s", name, problem)
        _logged[name] = problem
    return found.good


async def for_each(
    names: Sequence[str], act: Callable[[str], Awaitable[Found]], failure: str
) -> tuple[list[Found], list[str]]:
    """Act on several lineages, one after another; one that fails holds up none of the others.

    Args:
        names: the lineages.
        act: what is done with each.
        failure: logged with the traceback where it fails; its %s is the lineage.

    Returns:
        What `act` gave, and one line for each lineage that it failed with.
    """
    found, failed = [], []
    for name in names:
        try:
            found.append(await act(name))
        except Interrupted:
            raise
        except Exception as error:
            logger.exception(failure, name)
            failed.append(f"{name}: {in_one_line(error)}")
    return found, failed


def add_lineage(store: ObjectStore, lineage: WatchedLineage) -> str:
    """Write a lineage's file, or replace it; return its address."""
    given = lineage.model_dump(mode="json", exclude_unset=True)
    text = yaml.safe_dump({"lineage": lineage.lineage, **given}, sort_keys=False, allow_unicode=True)
    store.put_bytes(keys.settings_key(lineage.lineage), text.encode())
    return store.uri_of(keys.settings_key(lineage.lineage))
