"""An object store in a folder."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from deal_core.errors import StoreError
from infra.object_store import (
    RESERVED,
    ObjectInfo,
    ObjectNotFoundError,
    ObjectStore,
    check_key,
    check_source,
    complete_file,
    folder_of,
)

NUM_TRIES = 20
"""How often a writer makes a folder again that a deleter, working beside it, found empty and removed."""


class FileStore(ObjectStore):
    """Objects are files below `root`, which is made by the first write.

    A file is written under another name and then linked or renamed, so a reader never sees half of one, and a hard
    link decides between writers that must not overwrite each other.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().resolve()
        self.uri = self.root.as_uri()

    def get_bytes(self, key: str) -> bytes:
        """Read the file."""
        with self._saying("read", key):
            return self._path(key).read_bytes()

    def get_start(self, key: str, num_bytes: int) -> bytes:
        """Read the beginning of the file."""
        with self._saying("read", key), self._path(key).open("rb") as reader:
            return reader.read(num_bytes)

    def put_bytes(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        """Write the file; a hard link decides between writers that come together."""
        target = self._path(key)
        with self._saying("write", key), self._incoming() as part:
            with part.open("wb") as writer:
                writer.write(data)
                writer.flush()
                os.fsync(writer.fileno())
            return _place(part, target, if_absent=if_absent)

    def find(self, key: str) -> ObjectInfo | None:
        """Look at the file."""
        with self._saying("look up", key), suppress(FileNotFoundError):
            return self._info(key) if self._path(key).is_file() else None
        return None

    def _list_all(self, prefix: str) -> Iterator[ObjectInfo]:
        """Files below a folder."""
        folder = folder_of(prefix)
        found = []
        with self._saying("list", prefix):
            for parent, folders, names in os.walk(self.root / folder, onerror=_raise_unless_gone):
                if Path(parent) == self.root and RESERVED in folders:
                    folders.remove(RESERVED)
                found += [(Path(parent) / name).relative_to(self.root).as_posix() for name in names]
        for key in sorted(found, key=os.fsencode):
            with suppress(FileNotFoundError):  # deleted since, or a dangling link
                yield self._info(key)

    def upload_file(self, local: Path, key: str) -> None:
        """Copy a file in."""
        target = self._path(key)
        with self._saying("write", key), self._incoming() as part:
            _copy(check_source(local, key), part)
            _place(part, target, if_absent=False)

    def download_file(self, key: str, local: Path) -> None:
        """Copy a file out."""
        source = self._path(key)
        with self._saying("read", key), source.open("rb"), complete_file(local) as part:
            _copy(source, part)

    def delete(self, prefix: str) -> int:
        """Delete files, and the folders that this leaves empty."""
        whole = check_key(prefix.removesuffix("/"))
        keys = [info.key for info in self.list(whole)] + [whole] * self.exists(whole)
        with self._saying("delete", prefix):
            for key in keys:
                path = self._path(key)
                path.unlink(missing_ok=True)
                with suppress(OSError):  # the folder is not empty, or gone already
                    while (path := path.parent) != self.root:
                        path.rmdir()
        return len(keys)

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    def _info(self, key: str) -> ObjectInfo:
        status = (self.root / key).stat()
        modified = datetime.fromtimestamp(status.st_mtime, UTC)
        etag = f"{status.st_mtime_ns:x}-{status.st_ino:x}-{status.st_size:x}"
        return ObjectInfo(key=key, size=status.st_size, etag=etag, modified=modified)

    @contextmanager
    def _incoming(self) -> Iterator[Path]:
        folder = self.root / RESERVED
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / uuid.uuid4().hex
        try:
            yield part
        finally:
            part.unlink(missing_ok=True)

    @contextmanager
    def _saying(self, doing: str, key: str) -> Iterator[None]:
        """Turn the system's errors into one that says what failed, and where."""
        try:
            yield
        except OSError as error:
            if doing == "read" and isinstance(error, (FileNotFoundError, IsADirectoryError, NotADirectoryError)):
                raise ObjectNotFoundError(f"There is no object {key!r} in {self.uri}; check the name.") from error
            reason = error.strerror or str(error)
            raise StoreError(f"Cannot {doing} {key!r} in {self.uri}: {reason}; check the folder.") from error


def _raise_unless_gone(error: OSError) -> None:
    """Leave out a folder that is not there, or is a file; one that cannot be read would be taken for empty."""
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise error


def _place(part: Path, target: Path, *, if_absent: bool) -> bool:
    """Give a complete file its name; False when the name is taken and must not be taken over."""
    for remaining in reversed(range(NUM_TRIES)):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except FileExistsError:  # it was there and is gone again, or a file is in the way
            if not remaining:
                raise
            continue
        try:
            if not if_absent:
                os.replace(part, target)
            else:
                os.link(part, target)
            return True
        except FileExistsError:
            if target.is_dir():
                raise
            return False
        except FileNotFoundError:
            if not remaining:
                raise
    raise AssertionError("unreachable")


def _copy(source: Path, target: Path) -> None:
    """Copy a file's content in pieces and wait until it is on the disk."""
    with source.open("rb") as reader, target.open("wb") as writer:
        shutil.copyfileobj(reader, writer, 1 << 20)
        writer.flush()
        os.fsync(writer.fileno())
