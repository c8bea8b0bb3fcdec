"""The arrivals for `deal data list`: those that are stored, learned or forgotten, and those that are held."""

from __future__ import annotations

from collections import defaultdict

from pydantic import BaseModel

from infra.store import keys
from infra.store.base import ObjectStore
from infra.versions import Versions
from tasks.housekeeping.arrivals import manifests_of
from tasks.inbox import find_held
from tasks.lineage.tombstones import find_tombstone


class ListedArrival(BaseModel, frozen=True):
    """One arrival."""

    name: str
    """What other commands call it: the first characters of its dataset's digest, or inbox/TASK/FILE."""
    task: str
    dataset_sha256: str | None = None
    """None: it is held and has no dataset yet."""
    num_train: int | None = None
    num_test: int | None = None
    learned_by: tuple[str, ...] = ()
    """LINEAGE/VERSION of every version that was trained on it."""
    state: str
    """stored, learned, held (and why), or forgotten (when, and why)."""


def list_data(store: ObjectStore) -> list[ListedArrival]:
    """Return all arrivals by task, each once, also if several lineages learned it."""
    learned_by: dict[tuple[str, str], list[str]] = defaultdict(list)
    for lineage in Versions(store).lineages():
        for version in Versions(store).all(lineage):
            learned_by[version.task, version.dataset_sha256].append(f"{lineage}/{version.version}")
    manifests = {(manifest.task.name, sha256): manifest for sha256, manifest in manifests_of(store)}
    forgotten = {info.key for info in store.list(keys.FORGOTTEN)}  # one listing instead of a request for each arrival
    arrivals = []
    for task, sha256 in sorted({*learned_by, *manifests}):
        manifest, versions = manifests.get((task, sha256)), learned_by.get((task, sha256), [])
        tombstone = find_tombstone(store, task, [sha256]) if keys.tombstone_key(task, sha256) in forgotten else None
        arrivals.append(
            ListedArrival(
                name=sha256[:12],
                task=task,
                dataset_sha256=sha256,
                num_train=manifest and manifest.num_train,
                num_test=manifest and manifest.num_test,
                learned_by=tuple(versions),
                state=tombstone.said if tombstone else "learned" if versions else "stored",
            )
        )
    watched = {keys.lineage_of_watch(info.key) for info in store.list(keys.WATCH)}
    held = {
        arrival.key: f"held for {lineage}: {arrival.why}"
        for lineage in sorted(watched)
        for arrival in find_held(store, lineage)
    }
    return arrivals + [
        ListedArrival(name=key, task=keys.task_of(key), state=state) for key, state in sorted(held.items())
    ]
