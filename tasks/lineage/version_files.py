"""Read the files of a version in the store, and check the copy of its adapter.

An error names the damaged file, its version, and what still works. A version has a digest for each file of its adapter
(`files_sha256`): the files that the caller reads are compared.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from deal_core.adapter.files import (
    ADAPTER_FILES,
    CONFIG_FILE,
    METHOD_FILES,
    PEFT_FILES,
    WEIGHTS_FILE,
    as_recorded,
    digests_of,
    require_undamaged,
)
from deal_core.errors import DealError, StoreError
from infra.store.base import ObjectNotFoundError, ObjectStore, temporary_folder
from infra.store.keys import file_name, lineage_of
from infra.store.stored import BREAK_READERS, reading_stored
from infra.versions import Version, Versions, remedy_for

NEEDED_IN_CONFIG = {"peft_type", "r", "lora_alpha", "target_modules"}
MAX_HEADER_BYTES = 100_000_000
"""The longest header that safetensors reads."""


@contextmanager
def reading_beside(store: ObjectStore, adapter_uri: str, name: str) -> Iterator[None]:
    """Do the same as `reading_stored` for the file `name` of an adapter's folder. The error names the version."""
    try:
        yield
    except (StoreError, *BREAK_READERS) as error:
        what, remedy = _described(store, adapter_uri)
        with reading_stored(store, f"{adapter_uri}/{name}", what, remedy):
            raise error


def _require_readable(store: ObjectStore, adapter_uri: str, folder: Path, names: Collection[str]) -> None:
    """Require readable files in `folder`, a local copy of an adapter's folder. Those of the method may be missing."""
    for name in names:
        path = folder / name
        with reading_beside(store, adapter_uri, name):
            if path.is_file():
                _check_file(path)
            elif name in PEFT_FILES:
                raise ObjectNotFoundError(name)


def require_stored(store: ObjectStore, adapter_uri: str) -> None:
    """Require the configuration and the weights of an adapter in the store.

    Only the header of the weights is fetched. It tells the length of the file.

    Raises:
        ObjectNotFoundError: A file is missing.
        StoreError: A file is damaged.
    """
    with reading_beside(store, adapter_uri, CONFIG_FILE):
        _check_config(json.loads(store.get_bytes(f"{adapter_uri}/{CONFIG_FILE}")))
    with reading_beside(store, adapter_uri, WEIGHTS_FILE):
        _check_header(store, f"{adapter_uri}/{WEIGHTS_FILE}")


def _check_file(path: Path) -> None:
    """Check a file of an adapter: the header of a safetensors file, or a JSON object."""
    if path.name == CONFIG_FILE:
        _check_config(json.loads(path.read_bytes()))
    elif path.suffix == ".json":
        _require_object(json.loads(path.read_bytes()))
    else:
        _open_weights(path)


def _require_object(values: object) -> dict[str, object]:
    if not isinstance(values, dict):
        raise ValueError("it is no JSON object")
    return values


def _check_config(values: object) -> None:
    missing = NEEDED_IN_CONFIG - _require_object(values).keys()
    if missing:
        raise ValueError(f"it lacks {', '.join(sorted(missing))}")


def _check_header(store: ObjectStore, key: str) -> None:
    """Check a stored safetensors file by its size and header, with a local sparse file of the same size and header."""
    info = store.find(key)
    if info is None:
        raise ObjectNotFoundError(key)
    num_bytes = 8 + int.from_bytes(store.get_bytes(key, at_most=8), "little")
    if not 8 < num_bytes <= min(info.size, MAX_HEADER_BYTES):
        raise ValueError(f"its {info.size} bytes have no safetensors header")
    with temporary_folder() as folder:
        path = folder / WEIGHTS_FILE
        with path.open("wb") as file:
            file.write(store.get_bytes(key, at_most=num_bytes))
            file.truncate(info.size)
        _open_weights(path)


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
    version = _version_with(store, lineage, adapter_uri)
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


def _version_with(store: ObjectStore, lineage: str, adapter_uri: str) -> Version | None:
    """The version with an adapter; None: none has it, or the versions cannot be read."""
    try:
        versions = Versions(store).all(lineage)
    except DealError:
        return None
    return next((version for version in versions if version.adapter_uri == adapter_uri), None)


@contextmanager
def borrowed_folder(store: ObjectStore, uri: str) -> Iterator[Path]:
    """Give a local copy of an adapter's folder, without a comparison of digests. The copy is removed at the end.

    Raises:
        ObjectNotFoundError: The configuration or the weights are missing.
        StoreError: The configuration or the weights are damaged.
    """
    with temporary_folder() as temporary:
        folder = temporary / "folder"
        with reading_beside(store, uri, CONFIG_FILE):
            store.download_folder(uri, folder)
        _require_readable(store, uri, folder, PEFT_FILES)
        yield folder


@contextmanager
def borrowed_adapter(store: ObjectStore, version: Version, *, with_method: bool = False) -> Iterator[Path]:
    """Give a local copy of a version's adapter folder. The copy is removed at the end.

    With `with_method`, the files of the method's state are checked too.

    Raises:
        IntegrityError: The digest of a file that the caller reads is not the recorded digest.
        ObjectNotFoundError: The store has no such folder.
    """
    with borrowed_folder(store, version.adapter_uri) as folder:
        if with_method:
            _require_readable(store, version.adapter_uri, folder, METHOD_FILES)
        require_recorded(store, version, folder, with_method=with_method)
        yield folder


def fetch_adapter(store: ObjectStore, version: Version, folder: Path) -> None:
    """Copy the files of a version's adapter that training it on needs into a new folder, and check them.

    Raises:
        IntegrityError: The digest of a file is not the recorded digest.
        ObjectNotFoundError: The configuration or the weights are missing.
        StoreError: A file is damaged.
    """
    uri = version.adapter_uri
    names = {file_name(info.key) for info in store.list(uri)}
    for name in ADAPTER_FILES:
        if name in names:
            with reading_beside(store, uri, name):
                store.download_file(f"{uri}/{name}", folder / name)
    _require_readable(store, uri, folder, ADAPTER_FILES)
    require_recorded(store, version, folder, with_method=True)


@contextmanager
def borrowed_parent(store: ObjectStore, parent: Version | None) -> Iterator[Path | None]:
    """Give a copy of a parent's adapter as `fetch_adapter` writes it, which is removed at the end; None: no parent."""
    if parent is None:
        yield None
        return
    with temporary_folder() as temporary:
        fetch_adapter(store, parent, temporary / "parent")
        yield temporary / "parent"


def require_recorded(store: ObjectStore, version: Version, folder: Path, *, with_method: bool = False) -> None:
    """Raise IntegrityError if a file that the caller reads has not its recorded digest.

    `folder` is a copy of the adapter's folder.
    """
    names = ADAPTER_FILES if with_method else PEFT_FILES
    require_undamaged(
        digests_of(folder, names),
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
    recorded = version.files_sha256
    with borrowed_folder(store, version.adapter_uri) as old:
        found = digests_of(old)
    new = {name: sha256 for name, sha256 in digests_of(folder).items() if found.get(name) in recorded.get(name, ())}
    between = {**recorded, **{name: (found[name], sha256) for name, sha256 in new.items()}}
    versions = Versions(store)
    versions.note_files(version, between)
    yield
    versions.note_files(version, {**recorded, **as_recorded(new)})
