"""Arrivals that the arrival check holds: what a person has to look at, and whether it was let go on.

A note belongs to the place of an arrival, its files, and to their content: a corrected file is another arrival, which
is checked anew. The note has no text of a row.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import UTC, datetime

from infra.lineage_state import HeldByCheck, LineageState, read_state, update
from infra.store import keys
from infra.store.base import ObjectStore
from tasks.references import DatasetRef
from tasks.spec import TaskSpec


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
    update(store, lineage, lambda state: _without(state, held.task, held.names, held))
    return held


def is_released(store: ObjectStore, lineage: str, task: TaskSpec, dataset: DatasetRef) -> bool:
    """Return whether a person has let these rows go on."""
    names = names_of(store, task)
    return any(
        (held.task, held.names, held.landed_sha256) == (task.name, names, dataset.landed_sha256) and held.released
        for held in read_state(store, lineage).held
    )


def release_checked(state: LineageState, arrivals: Sequence[HeldByCheck]) -> LineageState:
    """Let arrivals go on."""
    now = datetime.now(UTC)
    held = tuple(each.model_copy(update={"released": now}) if each in arrivals else each for each in state.held)
    return state.model_copy(update={"held": held})


def end_hold(store: ObjectStore, lineage: str, task: TaskSpec) -> None:
    """Delete the note about an arrival, which is over: a version has learned what lies there now."""
    names = names_of(store, task)
    update(store, lineage, lambda state: _without(state, task.name, names))


def held_by_check(state: LineageState) -> tuple[HeldByCheck, ...]:
    """Return the arrivals that wait, oldest first."""
    return tuple(sorted((held for held in state.held if held.released is None), key=lambda held: held.at))


def _without(state: LineageState, task: str, names: tuple[str, ...], *others: HeldByCheck) -> LineageState:
    """The state without the note about these files, and with other notes."""
    left = [held for held in state.held if (held.task, held.names) != (task, names)]
    return state.model_copy(update={"held": (*left, *others)})
