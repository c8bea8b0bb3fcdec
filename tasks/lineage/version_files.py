"""Read the files of a version in the store, and check the copy of its adapter.

An error names the damaged file, its version, and what still works. A version has a digest for each file of its adapter
(`files_sha256`): the files that the caller reads are compared.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open

from deal_core.adapter.files import (
    ADAPTER_FILES,
    CONFIG_FILE,
    PEFT_FILES,
    as_recorded,
    digests_of,
    require_undamaged,
)
from deal_core.errors import DealError, StoreError
from infra.store.base import ObjectNotFoundError, ObjectStore, temporary_folder
from infra.store.keys import file_name, lineage_of
from infra.store.stored import BREAK_READERS, reading_stored
from infra.versions import Version, Versions, remedy_for

CARD_FILE = "README.md"
"""The model card next to an adapter."""
NEEDED_IN_CONFIG = {"peft_type", "r", "lora_alpha", "target_modules"}


@contextmanager
def reading_beside(store: ObjectStore, adapter_uri: str, name: str) -> Iterator[None]:
    """Do the same as `reading_stored` for the file `name` of an adapter's folder. The error names the version."""
    try:
        yield
    except (StoreError, *BREAK_READERS) as error:
        what, remedy = _described(store, adapter_uri)
        with reading_stored(store, f"{adapter_uri}/{name}", what, remedy):
            raise error


def _check_json(name: str, content: bytes) -> None:
    """Raise ValueError if a file of an adapter is no JSON object, or the configuration lacks a field."""
    values = json.loads(content)
    if not isinstance(values, dict):
        raise ValueError("it is no JSON object")
    if name == CONFIG_FILE and (missing := NEEDED_IN_CONFIG - values.keys()):
        raise ValueError(f"it lacks {', '.join(sorted(missing))}")


def _open_weights(path: Path) -> None:
    try:
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{error}; it has {path.stat().st_size} bytes") from None


def _described(store: ObjectStore, adapter_uri: str) -> tuple[str, str]:
    """Name of a file of this adapter with its version, and the remedy for a damaged file."""
    lineage = lineage_of(adapter_uri)
    restore, history = "Restore it from a backup of the store.", f"deal version list --lineage {lineage}"
    version = None
    with suppress(DealError):  # the versions are damaged too: the file is named without its version
        version = next(
            (version for version in Versions(store).all(lineage) if version.adapter_uri == adapter_uri), None
        )
    if version is None:
        others = "Other versions work without it"
        return f"a file of an adapter of '{lineage}'", f"{restore} {others}; {history} lists them."
    if "champion" in version.aliases:
        return (
            f"a file of version {version.version}, champion of '{lineage}'",
            f"{restore} Other versions still work: go back to one with deal version rollback N --lineage {lineage}, or "
            f"ask one with deal predict --version N; {history} lists them.",
        )
    return (
        f"a file of version {version.version} of '{lineage}'",
        f"{restore} The champion, the other versions and {history} work without it.",
    )


def download_files(store: ObjectStore, adapter_uri: str, folder: Path, names: Iterable[str]) -> None:
    """Copy those of the named files that an adapter's folder in the store has."""
    present = {file_name(info.key) for info in store.list(adapter_uri)}
    for name in names:
        if name in present:
            with reading_beside(store, adapter_uri, name):
                store.download_file(f"{adapter_uri}/{name}", folder / name)


def fetch_adapter(store: ObjectStore, version: Version, folder: Path, names: Collection[str] = ADAPTER_FILES) -> None:
    """Copy the named files of a version's adapter into a folder, and check them. Those of the method may be missing.

    Raises:
        IntegrityError: The digest of a file is not the recorded digest.
        ObjectNotFoundError: The configuration or the weights are missing.
        StoreError: A file is damaged.
    """
    download_files(store, version.adapter_uri, folder, names)
    for name in names:
        with reading_beside(store, version.adapter_uri, name):
            path = folder / name
            if path.is_file():
                _check_json(name, path.read_bytes()) if path.suffix == ".json" else _open_weights(path)
            elif name in PEFT_FILES:
                raise ObjectNotFoundError(name)
    require_recorded(store, version, digests_of(folder, names), names)


def require_undamaged_adapter(store: ObjectStore, version: Version) -> None:
    """Compare the files of a version's adapter in the store with their digests. Nothing is written.

    Raises:
        IntegrityError: The digest of a file is not the recorded digest, or a file is missing.
    """
    digests = {}
    for name in ADAPTER_FILES:
        with suppress(ObjectNotFoundError):
            digests[name] = store.sha256_of(f"{version.adapter_uri}/{name}")
    require_recorded(store, version, digests, ADAPTER_FILES)


@contextmanager
def borrowed_adapter(store: ObjectStore, version: Version, *, with_method: bool = False) -> Iterator[Path]:
    """Give a copy of the files that answering needs, and of the model card. The copy is removed at the end.

    With `with_method`, it has the files that training the adapter on needs. Errors are those of `fetch_adapter`.
    """
    with temporary_folder() as folder:
        with suppress(ObjectNotFoundError):
            store.download_file(f"{version.adapter_uri}/{CARD_FILE}", folder / CARD_FILE)
        fetch_adapter(store, version, folder, ADAPTER_FILES if with_method else PEFT_FILES)
        yield folder


def require_recorded(store: ObjectStore, version: Version, digests: Mapping[str, str], names: Collection[str]) -> None:
    """Raise IntegrityError if the digest of one of the named files of a version is not the recorded one.

    `digests` are those of the files in the store, or of copies of them.
    """
    require_undamaged(
        digests,
        version.files_sha256,
        names,
        what=f"Version {version.version} of '{version.lineage}'",
        where=store.uri_of(version.adapter_uri),
        remedy=remedy_for(version),
    )


@contextmanager
def replacing(store: ObjectStore, version: Version, folder: Path) -> Iterator[None]:
    """Record the digests of the files in `folder`, while the block puts these files in place of a version's files.

    During the block, both the old and the new digest of a file are valid. Afterwards only the new digest is valid. A
    file that was damaged before keeps its recorded digest, so that the damage stays visible.
    """
    recorded, new = version.files_sha256, digests_of(folder)
    with temporary_folder() as before:
        download_files(store, version.adapter_uri, before, new)
        old = digests_of(before)
    new = {name: sha256 for name, sha256 in new.items() if old.get(name) in recorded.get(name, ())}
    versions = Versions(store)
    versions.note_files(version, {**recorded, **{name: (old[name], sha256) for name, sha256 in new.items()}})
    yield
    versions.note_files(version, {**recorded, **as_recorded(new)})
