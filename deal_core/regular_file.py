"""Files that are read only if they are regular, and written completely or not at all.

A FIFO, socket or device could block the reader or never end.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WRONG_PATH = (errno.ELOOP, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG)
"""Numbers of errors that say something about the path and nothing about the file."""
_KINDS = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


class IrregularFileError(OSError):
    """The path is a FIFO, a socket or a device."""


def open_regular(path: Path) -> io.BufferedReader:
    """Open a file to read its bytes. The call never waits, even if a FIFO replaces the file meanwhile.

    Raises:
        IrregularFileError: the path is a FIFO, a socket or a device.
        OSError: there is no such file, it is a folder, or it may not be read.
    """
    _require_regular(os.stat(path), path)  # opening some devices has side effects
    return open(path, "rb", opener=_open_regular)


def read_start(path: Path, limit: int) -> bytes:
    """The first `limit` bytes of a file, or all of a shorter file; the errors are those of `open_regular`."""
    with open_regular(path) as file:
        return file.read(limit)


def sha256_of_file(path: Path) -> str:
    """Hex digest of a file's bytes; the errors are those of `open_regular`."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def complete_file(target: Path) -> Iterator[Path]:
    """Yield a temporary path. After the block its file becomes `target` in one step; after an error it is deleted.

    The content is on the disk before the name is: after a power cut the file is complete, or as it was before.

    Raises:
        OSError: The target is a folder, or its folder cannot be written to.
    """
    target = target.absolute()  # "." has no name
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{uuid.uuid4().hex}.part")
    try:
        yield part
        flush_to_disk(part)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    """Wait until a file, or a folder with its files, is on the disk. Else a power cut may leave empty files."""
    for target in [path] if path.is_file() else [*path.rglob("*"), path]:
        descriptor = os.open(target, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def irregularity(mode: int) -> str | None:
    """Name of the irregular kind of this mode (from `os.stat`); None for a regular file or a folder."""
    return _KINDS.get(stat.S_IFMT(mode))


def _open_regular(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        _require_regular(os.fstat(descriptor), path)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _require_regular(status: os.stat_result, path: str | Path) -> None:
    kind = irregularity(status.st_mode)
    if kind is not None:
        raise IrregularFileError(errno.EINVAL, f"it is {kind}, and only regular files are read", str(path))
