"""The exports of a lineage's versions that this project has written, so that they can be removed again."""

from __future__ import annotations

import hashlib
import shutil
import socket
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from deal_core.adapter.files import digests_of, sha256_together
from infra.store import keys
from infra.store.base import ObjectStore
from infra.store.stored import Stored, parse_stored, read_folder, reading_stored, write_stored


class ExportNote(Stored):
    """An export of a version."""

    lineage: str
    version: str
    address: str
    """A folder, or the address of a repository."""
    host: str | None
    """Name of the machine with the folder; None: the address is that of a repository."""
    sha256: str | None = None
    """Digest of the folder's weights together. A folder with others is not removed."""


class RemovedExports(NamedTuple):
    """Exports that were removed, and those that this machine cannot remove."""

    removed: tuple[str, ...]
    left: tuple[str, ...]


def note_export(store: ObjectStore, lineage: str, version: str, address: str, folder: Path | None = None) -> None:
    """Write down an export. `folder` is its folder on this machine; None: it is elsewhere."""
    note = ExportNote(
        lineage=lineage,
        version=version,
        address=address,
        host=socket.gethostname() if folder else None,
        sha256=weights_digest(folder) if folder else None,
    )
    digest = hashlib.sha256(f"{note.host} {address}".encode()).hexdigest()
    write_stored(store, keys.export_key(lineage, version, digest), note)


def weights_digest(folder: Path) -> str:
    """Return the digest of the weights in a folder, all files together."""
    return sha256_together(digests_of(folder, sorted(path.name for path in folder.glob("*.safetensors"))))


def remove_exports(store: ObjectStore, lineage: str, versions: Collection[str]) -> RemovedExports:
    """Remove the known exports of versions. A folder with other weights than those that were exported stays.

    Copies for vLLM servers are removed too. The call can be repeated; what is gone counts as removed.
    """
    from infra.serving.engines import copies_of

    removed, left = [], []
    for key, content in read_folder(store, keys.export_folder(lineage)).items():
        with reading_stored(store, key, "the note about an export", "Delete it, and remove the export by hand."):
            note = parse_stored(content, ExportNote)
        if note.version not in versions:
            continue
        folder = Path(note.address)
        if note.host == socket.gethostname() and (not folder.is_dir() or weights_digest(folder) == note.sha256):
            shutil.rmtree(folder, ignore_errors=True)
            removed.append(note.address)
        else:
            left.append(f"{note.address} on {note.host}" if note.host else note.address)
    for version in versions:
        for copy in copies_of(lineage, version):
            shutil.rmtree(copy)
            removed.append(str(copy))
    return RemovedExports(tuple(removed), tuple(left))
