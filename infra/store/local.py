"""The object store in a folder."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from deal_core.errors import StoreError
from deal_core.regular_file import IrregularFileError, complete_file, irregularity, open_regular, sha256_of_file
from infra.store.base import (
    LOCK,
    RESERVED,
    ObjectInfo,
    ObjectNotFoundError,
    ObjectStore,
    UnusableObjectError,
    check_key,
    check_source,
    folder_of,
)

_FIRST_TIME, _LAST_TIME = (datetime(year, 1, 2, tzinfo=UTC).timestamp() for year in (1, 9999))
"""A file system has times that no datetime holds."""
NUM_TRIES = 20
"""How often a writer creates its folder again. A concurrent delete removes empty folders."""


class FileStore(ObjectStore):
    """A store whose objects are files below `root`. The first write creates `root`.

    Each file is written in the folder `.incoming` and then linked or renamed to its key. So a reader never sees an
    incomplete file, and a killed writer leaves an incomplete file only in `.incoming`.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().resolve()
        self.uri = self.root.as_uri()

    def get_bytes(self, key: str, *, at_most: int | None = None) -> bytes:
        """Read the file."""
        with self._report_errors("read", key), open_regular(self.path_of(key)) as file:
            return file.read(at_most)

    def sha256_of(self, key: str) -> str:
        """Read the file."""
        with self._report_errors("read", key):
            return sha256_of_file(self.path_of(key))

    def put_bytes(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        """Write the file. Of several concurrent writers with `if_absent`, the first hard link wins."""
        target = self._path(key)
        with self._report_errors("write", key), self._incoming() as part:
            part.write(data)
            return _place(part, target, if_absent=if_absent)

    def get_tagged(self, key: str) -> tuple[bytes, str]:
        """Read the file. Its tag is its digest: two files of a moment may have the same size and times."""
        content = self.get_bytes(key)
        return content, hashlib.sha256(content).hexdigest()

    def replace_bytes(self, key: str, data: bytes, tag: str) -> bool:
        """Compare and write the file under a lock, which all such writers of the store take."""
        target = self._path(key)
        with (
            self._report_errors("write", key),
            self._incoming() as part,
            (self.root / RESERVED / LOCK).open("ab") as lock,
        ):
            part.write(data)
            fcntl.flock(lock, fcntl.LOCK_EX)  # it ends with the process, too
            try:
                if self.get_tagged(key)[1] != tag:
                    return False
            except ObjectNotFoundError:
                return False
            return _place(part, target, if_absent=False)

    def find(self, key: str) -> ObjectInfo | None:
        """Look at the file."""
        with self._report_errors("look up", key), suppress(FileNotFoundError):
            path = self._path(key)
            return self._info_of(key, path.stat()) if path.is_file() else None
        return None

    def _list_all(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield the files below a folder."""
        folder = folder_of(prefix)
        top, *below = Path(folder).parts or ("",)
        if any((self.root / top / Path(*below[:depth])).is_symlink() for depth in range(1, len(below) + 1)):
            return
        keys = []
        with self._report_errors("list", prefix):
            for parent, folders, names in os.walk(self.root / folder, onerror=_raise_unless_gone):
                if Path(parent) == self.root:
                    folders[:] = [name for name in folders if name != RESERVED]
                else:  # os.walk does not follow links; a top folder may be one
                    names += [name for name in folders if os.path.islink(os.path.join(parent, name))]
                keys += [(Path(parent) / name).relative_to(self.root).as_posix() for name in names]
        for key in sorted(keys, key=os.fsencode):
            with suppress(FileNotFoundError):  # deleted meanwhile, or a link to nothing
                yield self._listed(key)

    def upload_file(self, local: Path, key: str) -> None:
        """Copy a file in."""
        target = self._path(key)
        with self._report_errors("write", key), self._incoming() as part:
            with open_regular(check_source(local, key)) as source:
                shutil.copyfileobj(source, part)
            _place(part, target, if_absent=False)

    def download_file(self, key: str, local: Path) -> None:
        """Copy a file out."""
        with (
            self._report_errors("read", key),
            open_regular(self.path_of(key)) as source,
            complete_file(local) as part,
            part.open("wb") as copy,
        ):
            shutil.copyfileobj(source, copy)

    def _delete_one(self, key: str) -> None:
        """Delete the file and the folders that become empty."""
        path = self._path(key)
        with self._report_errors("delete", key):
            path.unlink(missing_ok=True)
            with suppress(OSError):  # the folder is not empty, or does not exist
                while (path := path.parent) != self.root:
                    path.rmdir()

    def path_of(self, key: str) -> Path:
        """Return the path of an object to read; raise UnusableObjectError if a link leads out of its top folder."""
        path = self._path(key)
        if self._leads_out(key):
            top = key.split("/")[0]
            raise UnusableObjectError(f"{key!r} in {self.uri} is a link that leads out of {top}/; put the file there.")
        return path

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    def _leads_out(self, key: str) -> bool:
        """Return whether a link below the key's top folder leads to a file outside. The top folder may be a link."""
        top = os.path.realpath(self.root / key.split("/")[0])
        path = os.path.realpath(self.root / key)
        return path != top and not path.startswith(top + os.sep)

    def _listed(self, key: str) -> ObjectInfo:
        """Return the entry of a file that other programs may have made."""
        path = self.root / key
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            if path.is_dir():
                return self._info_of(key, status, "it is a link to a folder, which is not read; put the folder there")
            if self._leads_out(key):
                return self._info_of(
                    key, status, f"it is a link that leads out of {key.split('/')[0]}/; put the file there"
                )
            try:
                status = path.stat()
            except OSError as error:
                if error.errno != errno.ELOOP:
                    raise
                return self._info_of(key, status, "it is a link that leads to itself; remove it")
        kind = irregularity(status.st_mode)
        return self._info_of(key, status, kind and f"it is {kind}, and only regular files are read; remove it")

    def _info_of(self, key: str, status: os.stat_result, problem: str | None = None) -> ObjectInfo:
        etag = _etag_of(status)
        return ObjectInfo(
            key=key,
            size=status.st_size,
            etag=etag,
            modified=_time_of(status.st_mtime),
            landed=_time_of(status.st_ctime),
            problem=problem,
            read_sha256=partial(self._sha256_of, key, etag),
        )

    def _sha256_of(self, key: str, etag: str) -> str | None:
        """Return the digest of the content that has an ETag; None: the file is another one now, or cannot be read."""
        with suppress(OSError, StoreError):
            path = self.path_of(key)
            sha256 = sha256_of_file(path)
            return sha256 if _etag_of(path.stat()) == etag else None
        return None

    @contextmanager
    def _incoming(self) -> Iterator[io.BufferedWriter]:
        """Yield a new file in `.incoming`. Its writer holds a lock on it before it has content: see `is_deserted`."""
        folder = self.root / RESERVED
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / uuid.uuid4().hex
        try:
            with path.open("xb") as part:
                with suppress(OSError):  # a file system without locks: the age of the file tells
                    fcntl.flock(part, fcntl.LOCK_EX)
                yield part
        finally:
            path.unlink(missing_ok=True)

    @contextmanager
    def _report_errors(self, action: str, key: str) -> Iterator[None]:
        """Replace an OSError by a StoreError with the action and the place that failed."""
        try:
            yield
        except OSError as error:
            if action == "read" and isinstance(error, (FileNotFoundError, IsADirectoryError, NotADirectoryError)):
                raise ObjectNotFoundError(f"There is no object {key!r} in {self.uri}; check the name.") from error
            if isinstance(error, IrregularFileError):
                raise UnusableObjectError(f"Cannot {action} {key!r} in {self.uri}: {error.strerror}.") from error
            if error.errno == errno.ELOOP:
                problem = f"{key!r} in {self.uri} is a link that leads to itself; remove it."
                raise UnusableObjectError(problem) from error
            reason = error.strerror or str(error)
            raise StoreError(f"Cannot {action} {key!r} in {self.uri}: {reason}; check the folder.") from error


def _raise_unless_gone(error: OSError) -> None:
    """Raise the error unless the folder does not exist or is a file. An unreadable folder must not look empty."""
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise error


def is_deserted(part: Path) -> bool:
    """Return whether the writer of an unfinished file has died: the file has content, and nobody holds its lock.

    The system ends a lock together with its process, also in another container.
    """
    with suppress(OSError), part.open("r+b") as file:  # complete meanwhile, or another user's
        if os.fstat(file.fileno()).st_size:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    return False


def _place(part: io.BufferedWriter, target: Path, *, if_absent: bool) -> bool:
    """Give a complete file its name; return False if `if_absent` is set and the name exists."""
    part.flush()
    os.fsync(part.fileno())  # else a power cut may leave an empty file under the name
    for remaining in reversed(range(NUM_TRIES)):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if if_absent:
                os.link(part.name, target)
            else:
                os.replace(part.name, target)
            return True
        except (FileExistsError, FileNotFoundError):
            if if_absent and target.is_file():
                return False
            if not remaining or target.is_dir():  # otherwise the folder was deleted meanwhile
                raise
    raise AssertionError("unreachable")


def _etag_of(status: os.stat_result) -> str:
    # A correction may have the size and the time of what it replaces (`rsync -t`); st_ctime nobody can set.
    return f"{status.st_mtime_ns:x}-{status.st_size:x}-{status.st_ctime_ns:x}"


def _time_of(seconds: float) -> datetime:
    """A file's time; the first or the last that a datetime holds, if the file's is beyond it."""
    return datetime.fromtimestamp(min(max(seconds, _FIRST_TIME), _LAST_TIME), UTC)
