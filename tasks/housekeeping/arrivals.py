"""Find an arrival by what a person calls it, with every dataset and file that has its rows."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from deal_core.data.reading.lines import sha256_of_input
from deal_core.data.schema import DatasetManifest
from deal_core.errors import ConfigError
from infra.store import keys
from infra.store.base import ObjectStore
from infra.store.keys import (
    DATASETS,
    FORGOTTEN,
    INBOX,
    MANIFEST_FILE,
    QUARANTINE,
    TASK_FILE,
    dataset_sha256,
    quarantine_folder,
    task_of,
)
from infra.tracking.registry import Registry
from tasks.adaptation.ingest import read_manifest
from tasks.data_files import local_file
from tasks.housekeeping.inventory import list_all_lineages
from tasks.inbox import read_state
from tasks.lineage.tombstones import find_tombstone

MIN_PREFIX = 6
"""Fewest characters of a digest that name an arrival."""


@dataclass(frozen=True, kw_only=True)
class KnownArrival:
    """The known facts about an arrival."""

    task: str
    sha256: str
    """Digest of the dataset, or of the file if it gave no dataset."""
    files: tuple[str, ...]
    """Digests of the files that landed, including a test file."""
    key: str | None = None
    """Key in the inbox, if the user named the arrival by its key."""
    splits: tuple[str, ...] = ()
    """Digests of other datasets with the same landed rows but another split; set by `with_every_split`."""
    landed: tuple[str, ...] = ()
    """Digests of the landed rows, without the split; set by `with_every_split`."""

    @property
    def sha256s(self) -> tuple[str, ...]:
        """Digests of every dataset with the arrival's rows. The named dataset comes first."""
        return (self.sha256, *self.splits)

    def inbox_keys(self, store: ObjectStore, registry: Registry) -> list[str]:
        """Return the arrival's files in the inbox, found by their bytes or by the state of a watch."""
        listing = [info for info in store.list(keys.inbox_folder(self.task)) if keys.file_name(info.key) != TASK_FILE]
        etags = {info.key: info.etag for info in listing}
        handled = {
            each.key for each in _handled(store, registry, self.task)
            if each.sha256 in self.sha256s and each.etag == etags.get(each.key)
        }  # fmt: skip
        return [
            info.key for info in listing
            if info.key == self.key or info.key in handled or _digest_of(store, info.key) in self.files
        ]  # fmt: skip


def find_arrival(store: ObjectStore, registry: Registry, named: str) -> KnownArrival:
    """Find an arrival by the digest of its dataset, the digest's first characters, or a key or uri in the inbox.

    Raises:
        ConfigError: There is no such arrival, or several arrivals have this name.
    """
    root = store.uri.rstrip("/") + "/"
    key = named.removeprefix(root)
    if key.startswith(f"{INBOX}/"):
        return _by_key(store, registry, key)
    if not re.fullmatch(rf"[0-9a-f]{{{MIN_PREFIX},64}}", named):
        raise ConfigError(
            f"{named!r} is neither a digest (or {MIN_PREFIX} and more of its first characters) nor a key such as "
            f"{INBOX}/TASK/FILE; deal history --json shows the digests as dataset_sha256."
        )
    found = sorted({(task, sha256) for task, sha256 in _known_digests(store, registry) if sha256.startswith(named)})
    if not found:
        raise ConfigError(f"No arrival has a digest that begins with {named}; deal history --json shows the digests.")
    if len(found) > 1:
        listed = ", ".join(f"{sha256} ({task})" for task, sha256 in found)
        raise ConfigError(f"{named} is the beginning of {len(found)} digests: {listed}; give more of it.")
    return _known(store, *found[0], key=None)


def with_every_split(store: ObjectStore, registry: Registry, arrival: KnownArrival) -> KnownArrival:
    """Add every dataset with the arrival's landed rows, with any split.

    Datasets are found by their manifests, by the versions that learned from them, and by tombstones.
    """
    known = [(sha256, manifest.landed_sha256, manifest.files) for sha256, manifest in manifests_of(store, arrival.task)]
    known += [
        (version.dataset_sha256, version.landed_sha256, ())
        for lineage in list_all_lineages(store)
        for version in registry.versions(lineage) if version.task == arrival.task
    ]  # fmt: skip
    tombstone = find_tombstone(store, arrival.task, [arrival.sha256])
    landed = {found for sha256, found, _ in known if sha256 == arrival.sha256 and found}
    landed |= set(tombstone.landed if tombstone else ())
    same = [(sha256, files) for sha256, found, files in known if found in landed]
    splits = {sha256 for sha256, _ in same} | set(tombstone.splits if tombstone else ())
    files = dict.fromkeys((*arrival.files, *(digest for _, files in same for digest in files)))
    return replace(
        arrival, files=tuple(files), splits=tuple(sorted(splits - {arrival.sha256})), landed=tuple(sorted(landed))
    )


def manifests_of(store: ObjectStore, task: str) -> Iterator[tuple[str, DatasetManifest]]:
    """Yield the digest and the manifest of every dataset of a task, once for each lineage with the dataset."""
    for info in store.list(f"{DATASETS}/{task}"):
        folder, _, name = info.key.rpartition("/")
        if name == MANIFEST_FILE:
            yield dataset_sha256(folder), read_manifest(store, folder)


def _by_key(store: ObjectStore, registry: Registry, key: str) -> KnownArrival:
    task = task_of(key)
    landed = {_digest_of(store, key)} if store.exists(key) else set()
    found = {sha256 for sha256, manifest in manifests_of(store, task) if landed & set(manifest.files)}
    found |= {each.sha256 for each in _handled(store, registry, task) if each.key == key}
    if len(found) > 1 and not _is_one_arrival(store, registry, task, found):
        raise ConfigError(
            f"{key} landed as {len(found)} datasets: {', '.join(sorted(found))}; give the digest of one of them."
        )
    if found:
        return _known(store, task, min(found), key=key)
    if not landed:
        raise ConfigError(f"There is no {store.uri_of(key)}, and no watch has handled one; check the key.")
    return _known(store, task, landed.pop(), key=key)


def _is_one_arrival(store: ObjectStore, registry: Registry, task: str, sha256s: Collection[str]) -> bool:
    """Whether the datasets have the same landed rows with different splits."""
    known = with_every_split(store, registry, _known(store, task, min(sha256s), key=None))
    return set(sha256s) <= set(known.sha256s)


def _known(store: ObjectStore, task: str, sha256: str, *, key: str | None) -> KnownArrival:
    files = dict.fromkeys(
        digest for found, manifest in manifests_of(store, task) if found == sha256 for digest in manifest.files
    )
    tombstone = find_tombstone(store, task, [sha256])
    files |= dict.fromkeys(tombstone.files if tombstone else ())
    if not files and any(True for _ in store.list(quarantine_folder(task, sha256))):
        files = {sha256: None}  # the whole file was refused
    if key is not None and store.exists(key):
        files |= {_digest_of(store, key): None}
    return KnownArrival(task=task, sha256=sha256, files=tuple(files), key=key)


def _known_digests(store: ObjectStore, registry: Registry) -> Iterator[tuple[str, str]]:
    for folder in (DATASETS, QUARANTINE):
        for info in store.list(folder):
            yield keys.task_and_digest(info.key)
    for info in store.list(FORGOTTEN):
        task, _, name = info.key.removeprefix(f"{FORGOTTEN}/").partition("/")
        tombstone = find_tombstone(store, task, [name.removesuffix(".json")])
        if tombstone is not None:
            yield task, tombstone.sha256
    for lineage in list_all_lineages(store):
        for version in registry.versions(lineage):
            yield version.task, version.dataset_sha256


class _Handled(NamedTuple):
    key: str
    etag: str
    sha256: str


def _handled(store: ObjectStore, registry: Registry, task: str) -> Iterator[_Handled]:
    """The datasets that watches made from a task's files."""
    for info in store.list(keys.WATCH):
        lineage = keys.lineage_of_watch(info.key)
        sha256_of = {version.version: version.dataset_sha256 for version in registry.versions(lineage)}
        for key, handled in read_state(store, lineage).files.items():
            if task_of(key) == task and handled.version in sha256_of:
                yield _Handled(key, handled.etag, sha256_of[handled.version])


def _digest_of(store: ObjectStore, key: str) -> str:
    with local_file(store, store.uri_of(key)) as path:
        return sha256_of_input(path)
