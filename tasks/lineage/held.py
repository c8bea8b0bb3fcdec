"""Arrivals that the arrival check holds: what a person has to look at, and whether it was let go on.

A note belongs to the place of an arrival, its files, and to their content: a corrected file is another arrival, which
is checked anew. The note has no text of a row.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from datetime import UTC, datetime

from infra.store import keys
from infra.store.base import ObjectStore
from infra.store.stored import Stored, read_stored, write_stored
from tasks.references import DatasetRef
from tasks.spec import TaskSpec


class HeldByCheck(Stored):
    """An arrival whose labels disagree with the champion."""

    task: str
    names: tuple[str, ...]
    """Its files as `deal data release` calls them; see `name_of`."""
    landed_sha256: str
    """Digest of its rows."""
    why: str
    at: datetime
    released: datetime | None = None
    """When a person let it go on; None: it waits."""


def name_of(store: ObjectStore, address: str) -> str:
    """Return what `deal data release` calls a file: inbox/TASK/FILE, an absolute path, or another address."""
    name = address.removeprefix(store.uri.rstrip("/") + "/").rstrip("/")
    is_whole = name != address.rstrip("/") or "://" in name or name.startswith(f"{keys.INBOX}/")
    return name if is_whole else os.path.abspath(name)


def names_of(store: ObjectStore, task: TaskSpec) -> tuple[str, ...]:
    """Return what `deal data release` calls the files of an arrival."""
    addresses = [task.data] if isinstance(task.data, str) else task.data
    return tuple(name_of(store, address) for address in addresses)


def hold(store: ObjectStore, lineage: str, task: TaskSpec, dataset: DatasetRef, why: str) -> HeldByCheck:
    """Note that an arrival is held."""
    held = HeldByCheck(
        task=task.name,
        names=names_of(store, task),
        landed_sha256=dataset.landed_sha256,
        why=why,
        at=datetime.now(UTC),
    )
    write_stored(store, _key(lineage, held.task, held.names), held)
    return held


def is_released(store: ObjectStore, lineage: str, task: TaskSpec, dataset: DatasetRef) -> bool:
    """Return whether a person has let these rows go on."""
    held = _read(store, _key(lineage, task.name, names_of(store, task)))
    return held is not None and held.released is not None and held.landed_sha256 == dataset.landed_sha256


def let_go(store: ObjectStore, lineage: str, held: HeldByCheck) -> None:
    """Note that a person lets an arrival go on."""
    released = held.model_copy(update={"released": datetime.now(UTC)})
    write_stored(store, _key(lineage, held.task, held.names), released)


def end_hold(store: ObjectStore, lineage: str, task: TaskSpec) -> None:
    """Delete the note about an arrival, which is over: a version has learned what lies there now."""
    store.delete(_key(lineage, task.name, names_of(store, task)))


def held_by_check(store: ObjectStore, lineage: str) -> tuple[HeldByCheck, ...]:
    """Return the arrivals that wait, oldest first."""
    notes = (_read(store, info.key) for info in list(store.list(keys.held_folder(lineage))))
    waiting = [held for held in notes if held is not None and held.released is None]
    return tuple(sorted(waiting, key=lambda held: held.at))


def _key(lineage: str, task: str, names: Sequence[str]) -> str:
    return keys.held_key(lineage, task, hashlib.sha256("\n".join(names).encode()).hexdigest())


def _read(store: ObjectStore, key: str) -> HeldByCheck | None:
    return read_stored(
        store,
        key,
        HeldByCheck,
        what="the note of an arrival that is held",
        remedy="Delete it: the arrival is then checked again.",
    )
