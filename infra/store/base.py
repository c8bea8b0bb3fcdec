"""The interface of every store: bytes and files under keys, with a conditional put.

Keys are relative paths with `/` between their parts. A prefix names a folder: `adapters/base` holds
`adapters/base/x`, not `adapters/base2/x`; the empty prefix holds everything. No key may be the folder of another one.
"""

from __future__ import annotations

import logging
import os
import tempfile
import unicodedata
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from deal_core.errors import StoreError
from infra.settings import HomeSettings

logger = logging.getLogger(__name__)

MAX_KEY_BYTES = 1024
MAX_PART_BYTES = 255
RESERVED = ".incoming"
"""No key may start with it: a folder store writes unfinished files there, and an S3 store its test object."""
_warned: set[tuple[str, str]] = set()
"""Pairs of a store and an unsafe key that this process has logged."""
TEMPORARY = "tmp"


class ObjectNotFoundError(StoreError):
    """Nothing is stored under the key or prefix asked for."""


class UnusableObjectError(StoreError):
    """What lies under the key is not read: no regular file, or a link that leads elsewhere."""


@dataclass(frozen=True, kw_only=True)
class ObjectInfo:
    """One entry of a listing; `etag` changes when the content does."""

    key: str
    size: int
    etag: str
    modified: datetime
    problem: str | None = None
    """Why what lies there is not read."""


def check_key(key: str) -> str:
    """Return `key` if it is safe on every store.

    Raises:
        StoreError: it is empty, absolute, too long, has an empty, `.` or `..` part, or a control character.
    """
    problem = _problem_of(key)
    if problem:
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
    """Why a listing leaves an object out, and what to do."""
    problem = _problem_of(info.key)
    return f"the key {problem}; rename it" if problem else info.problem


def folder_of(prefix: str) -> str:
    """The prefix as it starts the keys below it: checked, with one trailing slash, or empty."""
    bare = prefix.removesuffix("/")
    return check_key(bare) + "/" if bare else ""


def check_source(local: Path, key: str) -> Path:
    """Return the file `local`, which is about to be stored under `key`.

    Raises:
        StoreError: there is no such file.
    """
    if not local.is_file():
        raise StoreError(f"Cannot store {key!r}: there is no file {local}; check the path.")
    return local


@contextmanager
def complete_file(target: Path) -> Iterator[Path]:
    """Give a path to write to; what was written becomes `target` in one step, or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{uuid.uuid4().hex}.part")
    try:
        yield part
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


class ObjectStore(ABC):
    """A store of objects under keys. Each method raises StoreError for a bad key or a store that does not answer."""

    uri: str

    @abstractmethod
    def get_bytes(self, key: str, *, at_most: int | None = None) -> bytes:
        """The object's content.

        Args:
            key: where it lies.
            at_most: give only this many of its first bytes: somebody else may have stored more than memory holds.

        Raises:
            ObjectNotFoundError: there is none.
            UnusableObjectError: it is no regular file, or a link that leads elsewhere.
        """

    @abstractmethod
    def put_bytes(self, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        """Store `data` under `key`, whole or not at all.

        Args:
            key: where to.
            data: the content.
            if_absent: keep an object that is already there. Of several concurrent writers exactly one wins.

        Returns:
            Whether `data` was stored. False only with `if_absent`, when the key was taken.
        """

    def check(self) -> None:  # noqa: B027 - a folder needs no check: hard links are atomic
        """Test whether the server honours a conditional put.

        Raises:
            StoreError: the server ignores the condition, so concurrent writers would overwrite each other.
        """

    @abstractmethod
    def find(self, key: str) -> ObjectInfo | None:
        """The entry of the object under exactly this key; None when there is none."""

    def exists(self, key: str) -> bool:
        """Whether an object is stored under exactly this key."""
        return self.find(key) is not None

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Objects below `prefix`, sorted by the bytes of their keys.

        Objects that other programs stored under unsafe keys are skipped, and so is what is no regular file. Each key is
        logged once.
        """
        for info in self._list_all(prefix):
            problem = _skipped_for(info)
            if problem is None:
                yield info
            else:
                self.warn_once(info.key, f"Skipped {info.key!r} in {self.uri}: {problem}.")

    def warn_once(self, key: str, message: str) -> None:
        """Log a problem with a key, once in a process."""
        if (self.uri, key) not in _warned:
            _warned.add((self.uri, key))
            logger.warning("%s", message)

    def unusable_keys(self, prefix: str = "") -> dict[str, str]:
        """The keys below `prefix` that `list` skips: what is wrong with each, and what to do."""
        problems = ((info.key, _skipped_for(info)) for info in self._list_all(prefix))
        return {key: problem for key, problem in problems if problem is not None}

    @abstractmethod
    def _list_all(self, prefix: str) -> Iterator[ObjectInfo]:
        """All entries below `prefix`, those with unsafe keys included."""

    @abstractmethod
    def upload_file(self, local: Path, key: str) -> None:
        """Store a file's content without holding it in memory; whole or not at all."""

    @abstractmethod
    def download_file(self, key: str, local: Path) -> None:
        """Write the object to `local` without holding it in memory; whole or not at all.

        Raises:
            ObjectNotFoundError: nothing is stored under `key`.
        """

    def delete(self, prefix: str) -> int:
        """Delete the object `prefix` and all objects below it; return the number of deleted objects.

        Raises:
            StoreError: the prefix is empty, which would delete the whole store.
        """
        whole = check_key(prefix.removesuffix("/"))
        keys = [info.key for info in self.list(whole)] + [whole] * self.exists(whole)
        for key in keys:
            self._delete_one(key)
        return len(keys)

    @abstractmethod
    def _delete_one(self, key: str) -> None:
        """Delete the object under exactly this key, if there is one."""

    def uri_of(self, key: str) -> str:
        """Full address of a key or prefix, for people and other programs."""
        return f"{self.uri.rstrip('/')}/{check_key(key)}"

    def upload_folder(self, local: Path, prefix: str, *, marker: str | None = None) -> int:
        """Store every file below the folder `local` under `prefix`.

        Args:
            local: an existing folder.
            prefix: where to.
            marker: name of the file that goes last: once it is there, the rest is too.

        Returns:
            The number of files.

        Raises:
            StoreError: `local` is no folder, is empty, or lacks the marker.
        """
        files = sorted(path for path in local.rglob("*") if path.is_file())
        names = {path: path.relative_to(local).as_posix() for path in files}
        if not files or (marker is not None and marker not in names.values()):
            wanted = f"file {marker}" if files else "files"
            raise StoreError(f"The folder {local} has no {wanted} to upload to {prefix}; check that it was written.")
        for path in sorted(files, key=lambda path: names[path] == marker):
            self.upload_file(path, folder_of(prefix) + names[path])
        return len(files)

    def download_folder(self, prefix: str, local: Path) -> int:
        """Write every object below `prefix` into the folder `local`.

        A folder that did not exist appears complete or not at all; in one that did, files are replaced one by one and
        others stay.

        Returns:
            The number of files.

        Raises:
            ObjectNotFoundError: there is no object below `prefix`.
        """
        local.parent.mkdir(parents=True, exist_ok=True)
        start = len(folder_of(prefix))
        with tempfile.TemporaryDirectory(prefix=".", suffix=".part", dir=local.parent) as part:
            folder = local if local.is_dir() else Path(part) / "complete"
            num_files = 0
            for info in self.list(prefix):
                self.download_file(info.key, folder / info.key[start:])
                num_files += 1
            if not num_files:
                raise ObjectNotFoundError(f"There is nothing below {prefix!r} in {self.uri}; check the name.")
            if folder != local:
                folder.rename(local)
        return num_files


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A new, empty folder in HOME/tmp, gone afterwards; only its user can look into it.

    A killed process leaves the folder, and the folder may hold rows. `deal gc` and `deal forget` find it there.
    """
    place = HomeSettings().home / TEMPORARY
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place) as folder:
        yield Path(folder)
