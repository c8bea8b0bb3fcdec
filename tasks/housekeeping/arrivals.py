"""List the arrivals, and find one by what a person calls it, with every dataset and file that has its rows.

Inputs are known as digests. They name the rows of the prediction log that `deal data delete` removes.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from datetime import datetime
from typing import Annotated, NamedTuple

from pydantic import BaseModel

from deal_core.data.reading.lines import sha256_of_input
from deal_core.data.schema import DatasetManifest
from deal_core.errors import ConfigError
from deal_core.shown import Shown
from infra.deleted_inputs import UnknownRows
from infra.lineage_state import EndedArrival, lineages_with_state, read_ended, read_state
from infra.store import keys
from infra.store.base import ObjectInfo, ObjectStore
from infra.versions import ArrivalDigests, Version, Versions
from tasks.arrival_queue import is_of
from tasks.arrivals import held_arrivals
from tasks.data_files import local_files
from tasks.housekeeping.garbage import list_all_lineages
from tasks.inbox import find_landed, list_arrivals
from tasks.landed_inputs import inputs_of_dataset, inputs_of_file
from tasks.lineage.datasets import read_manifest
from tasks.lineage.tombstones import Tombstone, find_tombstone

MIN_PREFIX = 6
"""Fewest characters of a digest that name an arrival."""


class KnownArrival(ArrivalDigests, frozen=True):
    """The known facts about an arrival; `with_every_split` sets `splits` and `landed`."""

    key: str | None = None
    """Key in the inbox, if the user named the arrival by its key."""

    @property
    def sha256s(self) -> tuple[str, ...]:
        """Digests of every dataset with the arrival's rows. The named dataset comes first."""
        return (self.sha256, *self.splits)

    def inbox_files(self, store: ObjectStore) -> list[ObjectInfo]:
        """Return the arrival's files in the inbox, found by their bytes or by how they ended.

        Of a folder that is the arrival they are all files, also those that are not read: engines keep rows in some.
        """
        handled = [file for file in _learned(store, self.task) if file.sha256 in self.sha256s]
        listing = list(store.list(keys.inbox_folder(self.task)))
        own = {
            info.key
            for info in list_arrivals(listing)
            if info.key == self.key or any(file.key == info.key and is_of(file.note, info) for file in handled)
        }
        return [
            info
            for info in listing
            if keys.file_name(info.key) != keys.TASK_FILE
            and (keys.top_of(info.key) in own or _sha256_of(store, info.key) in self.files)
        ]


def find_arrival(store: ObjectStore, named: str) -> KnownArrival:
    """Find an arrival by its dataset's digest, the first characters of it, a key or uri in the inbox, or a name.

    The key may be that of a file, of a folder, or of a file in a folder: its arrival is the whole folder. The name is
    that of the file or folder which landed, without its place.

    Raises:
        ConfigError: There is no such arrival, or several arrivals have this name.
    """
    root = store.uri.rstrip("/") + "/"
    key = named.removeprefix(root).rstrip("/")
    if key.startswith(f"{keys.INBOX}/"):
        return _by_key(store, key)
    if not re.fullmatch(rf"[0-9a-f]{{{MIN_PREFIX},64}}", named):
        return _by_name(store, named)
    matches = sorted({(task, sha256) for task, sha256 in _known_digests(store) if sha256.startswith(named)})
    if not matches:
        raise ConfigError(f"No arrival has a digest that begins with {named}; deal data list shows the arrivals.")
    if len(matches) > 1:
        listed = ", ".join(f"{sha256} ({task})" for task, sha256 in matches)
        raise ConfigError(f"{named} is the beginning of {len(matches)} digests: {listed}; give more of it.")
    return _by_digest(store, *matches[0])


def with_every_split(store: ObjectStore, arrival: KnownArrival) -> KnownArrival:
    """Add every dataset with the arrival's landed rows, with any split.

    Datasets are found by their manifests, by the versions that learned from them, and by tombstones.
    """
    datasets = [
        (sha256, manifest.landed_sha256, manifest.files) for sha256, manifest in manifests_of(store, arrival.task)
    ]
    datasets += [
        (version.dataset_sha256, version.landed_sha256, ())
        for lineage in list_all_lineages(store)
        for version in Versions(store).all(lineage)
        if version.task == arrival.task and not version.is_consolidation
    ]
    tombstone = find_tombstone(store, arrival.task, [arrival.sha256])
    # an arrival that is known only by its file may have become a dataset meanwhile, in each lineage another one
    landed = {rows for sha256, rows, files in datasets if arrival.sha256 in (sha256, *files)}
    landed |= set(tombstone.landed if tombstone else ())
    same = [(sha256, files) for sha256, rows, files in datasets if rows in landed]
    splits = {sha256 for sha256, _ in same} | set(tombstone.splits if tombstone else ())
    files = dict.fromkeys((*arrival.files, *(digest for _, files in same for digest in files)))
    others = tuple(sorted(splits - {arrival.sha256}))
    return arrival.model_copy(update={"files": tuple(files), "splits": others, "landed": tuple(sorted(landed))})


def quarantine_of(store: ObjectStore, arrival: KnownArrival, sha256s: Collection[str]) -> Iterator[ObjectInfo]:
    """Yield the files with the bad rows of datasets, and those of refused arrivals that had a file of the arrival."""
    listing = list(store.list(f"{keys.QUARANTINE}/{arrival.task}"))
    own = {*sha256s, *arrival.files}
    for info in listing:
        if info.key.endswith(keys.REFUSED_FILES) and own & set(json.loads(store.get_bytes(info.key))):
            own.add(keys.task_and_digest(info.key)[1])
    yield from (info for info in listing if keys.task_and_digest(info.key)[1] in own)


def manifests_of(store: ObjectStore, task: str | None = None) -> Iterator[tuple[str, DatasetManifest]]:
    """Yield the digest and the manifest of every dataset, of one task or of all, once for each lineage with it."""
    for info in _manifest_files(store, task):
        yield keys.dataset_sha256(info.key), _manifest_at(store, info)


def _manifest_files(store: ObjectStore, task: str | None = None) -> Iterator[ObjectInfo]:
    listing = store.list(keys.DATASETS if task is None else f"{keys.DATASETS}/{task}")
    return (info for info in listing if keys.file_name(info.key) == keys.MANIFEST_FILE)


def _manifest_at(store: ObjectStore, info: ObjectInfo) -> DatasetManifest:
    return read_manifest(store, info.key.removesuffix(f"/{keys.MANIFEST_FILE}"))


def _by_key(store: ObjectStore, key: str) -> KnownArrival:
    task, arrival = keys.task_of(key), keys.arrival_of(key) or key
    landed = _digests_below(store, key)
    whole = landed if arrival == key else _digests_below(store, arrival)
    sha256s = {
        sha256 for sha256, manifest in manifests_of(store, task) if landed and landed.keys() <= set(manifest.files)
    }
    sha256s |= {file.sha256 for file in _learned(store, task) if file.key == arrival}
    if not sha256s and not landed:  # it may have been deleted, and the same call is given again
        sha256s = {tombstone.sha256 for tombstone in _tombstones(store, task) if arrival in tombstone.inbox_keys}
    if not sha256s and not landed:
        raise ConfigError(f"There is no {store.uri_of(key)}, and no watch has handled one; check the key.")
    known = _by_digest(store, task, min(sha256s) if sha256s else next(iter(whole)))
    # several datasets are one arrival if they have the same landed rows with different splits
    if len(sha256s) > 1 and not sha256s <= {*with_every_split(store, known).sha256s}:
        raise ConfigError(
            f"{key} landed as {len(sha256s)} datasets: {', '.join(sorted(sha256s))}; give the digest of one of them."
        )
    if sha256s and landed and known.files and landed.keys().isdisjoint(known.files):
        raise ConfigError(
            f"{key} has another content than the arrival {known.sha256}, which landed there before. Give this "
            "digest to forget that arrival. The present file was not learned: delete it, if it must go."
        )
    return known.model_copy(update={"key": arrival, "files": tuple(dict.fromkeys((*known.files, *whole)))})


def _by_name(store: ObjectStore, name: str) -> KnownArrival:
    learned = {
        (manifest.task.name, manifest.landed_sha256): sha256
        for sha256, manifest in manifests_of(store)
        if manifest.source == name
    }  # one for all splits of the same rows
    found = {f"{sha256[:12]} ({task})": _by_digest(store, task, sha256) for (task, _), sha256 in learned.items()}
    files = {file for arrival in found.values() for file in arrival.files}
    for key in sorted({keys.arrival_of(info.key) or info.key for info in store.list(keys.INBOX)}):
        if keys.file_name(key) == name and not _digests_below(store, key).keys() <= files:  # it was not learned
            found[key] = _by_key(store, key)
    if not found:
        raise ConfigError(
            f"No arrival is called {name!r}: it is neither a digest (or {MIN_PREFIX} and more of its first "
            f"characters), nor a key such as {keys.INBOX}/TASK/FILE, nor the name of a file that landed; deal data "
            "list shows the arrivals.",
            code="unknown-arrival",
        )
    if len(found) > 1:
        raise ConfigError(
            f"{len(found)} arrivals are called {name!r}: {', '.join(found)}; give the digest or the key of one.",
            code="ambiguous-arrival",
        )
    return found.popitem()[1]


def _by_digest(store: ObjectStore, task: str, sha256: str) -> KnownArrival:
    files = [name for own, manifest in manifests_of(store, task) if own == sha256 for name in manifest.files]
    tombstone = find_tombstone(store, task, [sha256])
    files += tombstone.files if tombstone else ()
    if not files and any(True for _ in store.list(keys.quarantine_folder(task, sha256))):
        files = [sha256]  # the whole file was refused
    return KnownArrival(task=task, sha256=sha256, files=tuple(dict.fromkeys(files)))


def _known_digests(store: ObjectStore) -> Iterator[tuple[str, str]]:
    for folder in (keys.DATASETS, keys.QUARANTINE):
        for info in store.list(folder):
            yield keys.task_and_digest(info.key)
    yield from ((tombstone.task, tombstone.sha256) for tombstone in _tombstones(store))
    for lineage in list_all_lineages(store):
        for version in Versions(store).all(lineage):
            yield from ((learned.task, learned.dataset_sha256) for learned in version.trained_on)


def _tombstones(store: ObjectStore, task: str | None = None) -> Iterator[Tombstone]:
    """The tombstones of one task's arrivals or of all, some of them more than once."""
    for info in store.list(keys.FORGOTTEN if task is None else f"{keys.FORGOTTEN}/{task}"):
        _, of_task, name = info.key.split("/")
        if (tombstone := find_tombstone(store, of_task, [name.removesuffix(".json")])) is not None:
            yield tombstone


class _Learned(NamedTuple):
    key: str
    note: EndedArrival
    sha256: str


def _learned(store: ObjectStore, task: str) -> Iterator[_Learned]:
    """The datasets that were made from a task's files in the inbox."""
    for lineage in {keys.lineage_of(info.key) for info in store.list(keys.ARRIVALS)}:
        sha256_of = {version.version: version.dataset_sha256 for version in Versions(store).all(lineage)}
        for key, end in read_ended(store, lineage).items():
            if keys.task_of(key) == task and end.version in sha256_of:
                yield _Learned(key, end, sha256_of[end.version])


def _digests_below(store: ObjectStore, key: str) -> dict[str, None]:
    """The digests of a file, or of the files with the rows of a folder, in their order."""
    arrival = find_landed(store, key)
    return dict.fromkeys(_sha256_of(store, file.key) for file in (arrival.files if arrival else ()))


def _sha256_of(store: ObjectStore, key: str) -> str:
    with local_files(store, store.uri_of(key)) as (file,):
        return sha256_of_input(file.path)


def arrival_inputs(
    store: ObjectStore,
    arrival: KnownArrival,
    inbox_keys: Sequence[str],
    manifests: Sequence[tuple[str, DatasetManifest]],
) -> tuple[set[str], list[UnknownRows]]:
    """Return the digests of an arrival's inputs, and the rows whose inputs are not known.

    They are read from its stored rows and from its files in the inbox. Training rows are deleted once they are learned,
    and their file may be gone. A stored file may be damaged. The rows are known all the same if another place has them.

    Args:
        store: The store.
        arrival: The arrival, with every split.
        inbox_keys: Its files in the inbox.
        manifests: The digests and the manifests of its task's datasets.
    """
    own = {sha256: manifest for sha256, manifest in manifests if sha256 in arrival.sha256s}
    # a file that was never learned is read as the other arrivals of its task
    schemas = {manifest.task.sha256: manifest.task for manifest in own.values() or (each for _, each in manifests)}
    inputs: set[str] = set()
    files_read: set[str] = set()
    known: set[str] = set()
    damaged: set[str] = set()
    for schema in schemas.values():
        for key in inbox_keys:
            digests, whole_file = inputs_of_file(store, key, schema)
            inputs |= digests
            files_read |= {whole_file} if whole_file else set()
        for sha256 in arrival.sha256s:
            for key, stored in inputs_of_dataset(store, schema, sha256):
                inputs |= stored or set()
                (damaged if stored is None else known).add(keys.file_name(key))
    if arrival.files and files_read.issuperset(arrival.files):
        known |= {keys.TRAIN_FILE, keys.TEST_FILE}
    if any(files_read.issuperset(manifest.training_files) for manifest in own.values() if manifest.training_files):
        known.add(keys.TRAIN_FILE)

    sha256, manifest = next(iter(own.items()), (arrival.sha256, None))
    num_rows = {
        keys.TRAIN_FILE: manifest and manifest.num_train,
        keys.TEST_FILE: manifest and manifest.num_test,
    }
    return inputs, [
        UnknownRows(dataset_sha256=sha256, file=file, num_rows=number, why="damaged" if file in damaged else "gone")
        for file, number in num_rows.items()
        if file not in known and number != 0
    ]


class ListedArrival(BaseModel, frozen=True):
    """One arrival, for `deal data list`."""

    name: Annotated[str, Shown("arrival")]
    """What other commands call it: the first characters of its dataset's digest, or inbox/TASK/FILE."""
    file: Annotated[str | None, Shown()] = None
    """Name of the file or folder that landed; None: it is not known any more."""
    landed: Annotated[datetime | None, Shown(spare=1)] = None
    """When its rows were stored first; None: it is held and has no dataset yet, or it is not known any more."""
    task: Annotated[str, Shown()]
    dataset_sha256: str | None = None
    """None: it is held and has no dataset yet."""
    num_train: Annotated[int | None, Shown("training rows")] = None
    num_test: Annotated[int | None, Shown("test rows")] = None
    learned_by: Annotated[tuple[str, ...], Shown()] = ()
    """LINEAGE/VERSION of every version that was trained on it."""
    state: Annotated[str, Shown()]
    """stored, learned, held (and why), rolled back (to which version, when, by whom and why), or forgotten (when, and
    why)."""


def list_data(store: ObjectStore) -> list[ListedArrival]:
    """Return all arrivals by task, each once, also if several lineages learned it."""
    learned_by: dict[tuple[str, str], list[Version]] = defaultdict(list)
    for lineage in Versions(store).lineages():
        for version in Versions(store).all(lineage):
            for learned in version.trained_on:
                learned_by[learned.task, learned.dataset_sha256].append(version)
    manifests: dict[tuple[str, str], DatasetManifest] = {}
    landed: dict[tuple[str, str], datetime] = {}
    for info in _manifest_files(store):
        manifest = _manifest_at(store, info)
        named = manifest.task.name, keys.dataset_sha256(info.key)
        manifests[named] = manifest
        landed[named] = min(info.modified, landed.get(named, info.modified))
    forgotten = {info.key for info in store.list(keys.FORGOTTEN)}  # one listing instead of a request for each arrival
    arrivals = []
    for task, sha256 in sorted({*learned_by, *manifests}):
        known, versions = manifests.get((task, sha256)), learned_by.get((task, sha256), [])
        tombstone = find_tombstone(store, task, [sha256]) if keys.tombstone_key(task, sha256) in forgotten else None
        rollbacks = [version.since.rolled_back for version in versions if version.since.rolled_back]
        state = "learned" if versions else "stored"
        if rollbacks and not any(version.accepted and not version.since.rolled_back for version in versions):
            state = rollbacks[-1].describe()
        arrivals.append(
            ListedArrival(
                name=sha256[:12],
                file=known and known.source,
                landed=landed.get((task, sha256)),
                task=task,
                dataset_sha256=sha256,
                num_train=known and known.num_train,
                num_test=known and known.num_test,
                learned_by=tuple(f"{version.lineage}/{version.version}" for version in versions),
                state=tombstone.said if tombstone else state,
            )
        )
    held = {
        arrival.key: ListedArrival(
            name=arrival.key,
            file=keys.file_name(arrival.key),
            task=arrival.task,
            state=f"held for {lineage}: {arrival.why}",
        )
        for lineage in lineages_with_state(store)
        for arrival in held_arrivals(read_state(store, lineage))
    }
    return arrivals + [held[key] for key in sorted(held)]
