"""An object store in a folder."""

from __future__ import annotations

import errno
import io
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from deal_core.errors import StoreError
from deal_core.regular_file import IrregularFileError, irregularity, open_regular
from infra.store.base import (
    RESERVED,
    ObjectInfo,
    ObjectNotFoundError,
    ObjectStore,
    UnusableObjectError,
    check_key,
    check_source,
    complete_file,
    folder_of,
)

NUM_TRIES = 20
"""How often a writer creates its folder again. A concurrent deleter removes folders that it finds empty."""


class FileStore(ObjectStore):
    """Objects are files below `root`. The first write creates `root`.

    Each file is written in the folder `.incoming` and then linked or renamed to its key. So a reader never sees half
    a file, and a killed writer leaves its unfinished file in `.incoming` alone. Of several writers that must not
    overwrite each other, the first hard link wins.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().resolve()
        self.uri = self.root.as_uri()

    def get_bytes(self, key: str, *, at_most: int | None = None) -> bytes:
        """Read the file."""
        with self._saying("read", key), open_regular(self.path_of(key)) as file:
            return file.read(at_most)

    def put_bytes(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        """Write the file; of several concurrent writers the first hard link wins."""
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
                yield self._listed(key)

    def upload_file(self, local: Path, key: str) -> None:
        """Copy a file in."""
        target = self._path(key)
        with self._saying("write", key), self._incoming() as part:
            with open_regular(check_source(local, key)) as source:
                _copy(source, part)
            _place(part, target, if_absent=False)

    def download_file(self, key: str, local: Path) -> None:
        """Copy a file out."""
        with self._saying("read", key), open_regular(self.path_of(key)) as source, complete_file(local) as part:
            _copy(source, part)

    def _delete_one(self, key: str) -> None:
        """Delete the file, and the folders that are empty then."""
        path = self._path(key)
        with self._saying("delete", key):
            path.unlink(missing_ok=True)
            with suppress(OSError):  # the folder is not empty, or gone already
                while (path := path.parent) != self.root:
                    path.rmdir()

    def path_of(self, key: str) -> Path:
        """Where an object lies that is about to be read.

        Raises:
            UnusableObjectError: a link leads out of the key's top folder, to what nobody has put into the store.
        """
        path = self._path(key)
        if self._leads_out(key):
            top = key.split("/")[0]
            raise UnusableObjectError(f"{key!r} in {self.uri} is a link that leads out of {top}/; put the file there.")
        return path

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    def _leads_out(self, key: str) -> bool:
        """Whether a link, the top folder's own left aside, leads to a file outside the key's top folder."""
        top = os.path.realpath(self.root / key.split("/")[0])
        path = os.path.realpath(self.root / key)
        return path != top and not path.startswith(top + os.sep)

    def _listed(self, key: str) -> ObjectInfo:
        """What a listing tells of a file that others may have made."""
        path = self.root / key
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            if self._leads_out(key):
                return _info_of(key, status, f"it is a link that leads out of {key.split('/')[0]}/; put the file there")
            try:
                status = path.stat()
            except OSError as error:
                if error.errno != errno.ELOOP:
                    raise
                return _info_of(key, status, "it is a link that leads to itself; remove it")
        kind = irregularity(status.st_mode)
        return _info_of(key, status, kind and f"it is {kind}, and only regular files are read; remove it")

    def _info(self, key: str) -> ObjectInfo:
        return _info_of(key, (self.root / key).stat())

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
        """Turn an error of the system into a StoreError that says what failed and where."""
        try:
            yield
        except OSError as error:
            if doing == "read" and isinstance(error, (FileNotFoundError, IsADirectoryError, NotADirectoryError)):
                raise ObjectNotFoundError(f"There is no object {key!r} in {self.uri}; check the name.") from error
            if isinstance(error, IrregularFileError):
                raise UnusableObjectError(f"Cannot {doing} {key!r} in {self.uri}: {error.strerror}.") from error
            if error.errno == errno.ELOOP:
                problem = f"{key!r} in {self.uri} is a link that leads to itself; remove it."
                raise UnusableObjectError(problem) from error
            reason = error.strerror or str(error)
            raise StoreError(f"Cannot {doing} {key!r} in {self.uri}: {reason}; check the folder.") from error


def _raise_unless_gone(error: OSError) -> None:
    """Raise the error, unless the folder is missing or is a file: an unreadable folder must not look empty."""
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise error


def _place(part: Path, target: Path, *, if_absent: bool) -> bool:
    """Give a complete file its name; return False when `if_absent` is set and the name is taken."""
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


def _info_of(key: str, status: os.stat_result, problem: str | None = None) -> ObjectInfo:
    modified = datetime.fromtimestamp(status.st_mtime, UTC)
    etag = f"{status.st_mtime_ns:x}-{status.st_ino:x}-{status.st_size:x}"
    return ObjectInfo(key=key, size=status.st_size, etag=etag, modified=modified, problem=problem)


def _copy(reader: io.BufferedReader, target: Path) -> None:
    """Copy a file in pieces of 1 MiB and wait until it is on the disk."""
    with target.open("wb") as writer:
        shutil.copyfileobj(reader, writer, 1 << 20)
        writer.flush()
        os.fsync(writer.fileno())
