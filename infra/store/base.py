"""The interface of every object store: bytes and files under keys, with a conditional put.

A key is a relative path with `/` between its parts. A prefix names a folder: `adapters/base` contains
`adapters/base/x`, but not `adapters/base2/x`. The empty prefix contains all keys. No key may be the folder of another.
"""

from __future__ import annotations

import logging
import tempfile
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from filelock import FileLock

from deal_core.errors import StoreError
from infra.settings import HomeSettings

logger = logging.getLogger(__name__)

MAX_KEY_BYTES = 1024
MAX_PART_BYTES = 255
RESERVED = ".incoming"
"""First part of no key: a folder store writes unfinished files there, and an S3 store what it tries out."""
TEMPORARY = "tmp"
LOCK = ".lock"
"""Name of the file that the user of a temporary folder locks, and so do the writers of a folder store that compare."""
_warned: set[tuple[str, str]] = set()
"""Pairs of a store's address and a key that this process has logged a warning about."""


class ObjectNotFoundError(StoreError):
    """Nothing is stored under the key or prefix."""

    code = "object-missing"


class UnusableObjectError(StoreError):
    """The key names no regular file, or a link that leads elsewhere. The store does not read such objects."""

    code = "object-unusable"


@dataclass(frozen=True, kw_only=True)
class ObjectInfo:
    """One entry of a listing; `etag` changes when the content does."""

    key: str
    size: int
    etag: str
    modified: datetime
    landed: datetime | None = None
    """When the content came into a folder store, which a copy that keeps times does not hide. None: `modified` says it.
    """
    problem: str | None = None
    """Why the store does not read the object; None: it can be read."""
    read_sha256: Callable[[], str | None] | None = field(default=None, compare=False, repr=False)
    """Reads the content of a file in a folder store, and returns its digest; None if the file has changed since. A copy
    of a store has other ETags, and the same digests. None: the ETag is of the content, which a copy keeps."""


def check_key(key: str) -> str:
    """Return `key` if every store can use it.

    Raises:
        StoreError: The key is empty, absolute or too long, or has an empty, `.` or `..` part or a control character.
    """
    if problem := _problem_of(key):
        raise StoreError(f"The key {key!r} {problem}; use a relative path such as 'inbox/billing/may.csv'.")
    return key


def _problem_of(key: str) -> str | None:
    parts = key.split("/")
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in key):
        return "has a control character or is not valid Unicode"
    if any(part in ("", ".", "..") for part in parts):
        return "has an empty, '.' or '..' part"
    if parts[0] == RESERVED:
        return f"starts with {RESERVED}, which the store keeps for itself"
    if len(key.encode()) > MAX_KEY_BYTES or max(len(part.encode()) for part in parts) > MAX_PART_BYTES:
        return f"is longer than {MAX_KEY_BYTES} bytes, or a part of it than {MAX_PART_BYTES}"
    return None


def _skipped_for(info: ObjectInfo) -> str | None:
    """Why a listing skips an object, and what to do."""
    problem = _problem_of(info.key)
    return f"the key {problem}; rename it" if problem else info.problem


def folder_of(prefix: str) -> str:
    """Return the checked prefix with one slash at its end; empty if the prefix is empty."""
    bare = prefix.removesuffix("/")
    return check_key(bare) + "/" if bare else ""


def check_source(local: Path, key: str) -> Path:
    """Return the path of a file that is to be stored under `key`; raise StoreError if it does not exist."""
    if not local.is_file():
        raise StoreError(f"Cannot store {key!r}: there is no file {local}; check the path.")
    return local


class ObjectStore(ABC):
    """Objects under keys.

    Raises:
        StoreError: In every method: the key is not valid, or the store does not answer.
        ObjectNotFoundError: In methods that read: there is no such object.
        UnusableObjectError: In methods that read: the store does not read the object.
    """

    uri: str

    @abstractmethod
    def get_bytes(self, key: str, *, at_most: int | None = None) -> bytes:
        """Return the object's content, or its first `at_most` bytes."""

    @abstractmethod
    def sha256_of(self, key: str) -> str:
        """Return the SHA-256 of the object's content, read in pieces that fit into memory."""

    @abstractmethod
    def put_bytes(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        """Store all of `data`, or nothing; return whether it was stored.

        With `if_absent` an existing object is kept. Of several concurrent writers exactly one stores its data.
        """

    @abstractmethod
    def get_tagged(self, key: str) -> tuple[bytes, str]:
        """Return the object's content and a tag that stands for it, for `replace_bytes`."""

    @abstractmethod
    def replace_bytes(self, key: str, data: bytes, tag: str) -> bool:
        """Store all of `data` if the object still has the content of this tag; return whether it was stored.

        Of several concurrent writers with the same tag exactly one stores its data.
        """

    def check(self) -> None:  # noqa: B027 - a folder needs no check: hard links and its lock are atomic
        """Raise StoreError if the server ignores the condition of a put, so writers would overwrite each other."""

    @abstractmethod
    def find(self, key: str) -> ObjectInfo | None:
        """Return the entry of the object with exactly this key; None: no object has it."""

    def exists(self, key: str) -> bool:
        """Return whether an object has exactly this key."""
        return self.find(key) is not None

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Yield the objects below `prefix`, sorted by the bytes of their keys.

        Objects with invalid keys, which other programs stored, are skipped, and so are irregular files. Each skipped
        key is logged once.
        """
        for info in self._list_all(prefix):
            problem = _skipped_for(info)
            if problem is None:
                yield info
            else:
                self.warn_once(info.key, f"Skipped {info.key!r} in {self.uri}: {problem}.")

    def warn_once(self, key: str, message: str) -> None:
        """Log a problem with a key, once per process."""
        if (self.uri, key) not in _warned:
            _warned.add((self.uri, key))
            logger.warning("%s", message)

    def unusable_keys(self, prefix: str = "") -> dict[str, str]:
        """Return the keys below `prefix` that `list` skips, each with its problem and what to do."""
        problems = ((info.key, _skipped_for(info)) for info in self._list_all(prefix))
        return {key: problem for key, problem in problems if problem is not None}

    @abstractmethod
    def _list_all(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield all entries below `prefix`, including those with invalid keys."""

    @abstractmethod
    def upload_file(self, local: Path, key: str) -> None:
        """Store a file in pieces that fit into memory. A reader sees the complete object or none."""

    def uploads(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Yield the uploads below `prefix` that have begun and not ended: no listing shows what they hold.

        `etag` names the upload, and `modified` is its begin. A folder store has none.
        """
        yield from ()

    def abort_upload(self, upload: ObjectInfo) -> None:
        """End an upload, and delete what it holds."""
        raise NotImplementedError(f"{self.uri} has no uploads")

    @abstractmethod
    def download_file(self, key: str, local: Path) -> None:
        """Write the object to `local` in pieces that fit into memory. A reader sees the complete file or none."""

    def delete(self, prefix: str) -> None:
        """Delete the object `prefix` and all objects below it. An empty prefix is refused."""
        whole = check_key(prefix.removesuffix("/"))
        for key in [info.key for info in self.list(whole)] + [whole] * self.exists(whole):
            self._delete_one(key)

    @abstractmethod
    def _delete_one(self, key: str) -> None:
        """Delete the object with exactly this key, if it exists."""

    def uri_of(self, key: str) -> str:
        """Return the full address of a key or prefix, for people and other programs."""
        return f"{self.uri.rstrip('/')}/{check_key(key)}"

    def upload_folder(self, local: Path, prefix: str, *, marker: str | None = None) -> None:
        """Store every file below the folder `local` under `prefix`.

        The file with the name `marker` is uploaded last, so its object shows that the upload is complete.

        Raises:
            StoreError: `local` is no folder, is empty, or does not contain the marker.
        """
        names = sorted(path.relative_to(local).as_posix() for path in local.rglob("*") if path.is_file())
        if not names or (marker is not None and marker not in names):
            wanted = f"file {marker}" if names else "files"
            raise StoreError(f"The folder {local} has no {wanted} to upload to {prefix}; check that it was written.")
        for name in sorted(names, key=lambda name: name == marker):
            self.upload_file(local / name, folder_of(prefix) + name)

    def download_folder(self, prefix: str, local: Path) -> None:
        """Write every object below `prefix` into the folder `local`."""
        keys = [info.key for info in self.list(prefix)]
        if not keys:
            raise ObjectNotFoundError(f"There is nothing below {prefix!r} in {self.uri}; check the name.")
        for key in keys:
            self.download_file(key, local / key.removeprefix(folder_of(prefix)))


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yield a new, empty folder in HOME/tmp, which is deleted after the block. Only its user can read it.

    A killed process leaves the folder, which may contain rows. `deal data gc` and `deal data delete` find it by its
    lock, which nobody holds any more.
    """
    place = HomeSettings().home / TEMPORARY
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place) as folder, FileLock(Path(folder) / LOCK, thread_local=False):
        yield Path(tempfile.mkdtemp(dir=folder))
