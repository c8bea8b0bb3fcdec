"""Bytes and lines of a text file, plain or gzip, with bounds on the size of a line and of an unpacked file."""

from __future__ import annotations

import gzip
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from deal_core.errors import DataValidationError
from deal_core.regular_file import IrregularFileError, open_regular, sha256_of_file

MAX_LINE_CHARS = 4 * 2**20
"""Longest line; the rest of a longer line is skipped."""
MAX_UNPACKED_BYTES = 2**28
MAX_UNPACKED_RATIO = 200
"""A gzip file may unpack to MAX_UNPACKED_BYTES or this many times its size, the larger of both. Text packs 2 to 20
times, a gzip bomb 1000 times."""
FREE_ROWS = 100_000
"""Number of rows that a packed file may always have. More rows need two bytes each: repeated rows are bad rows, and
different rows take more space."""


class Line(NamedTuple):
    """A line with its end; `is_whole` is False if only the line's beginning was kept."""

    number: int
    text: str
    is_whole: bool


def open_bytes(path: Path) -> io.BufferedReader:
    """The file's bytes. They are unpacked if they begin like gzip; the file's name does not count.

    Raises:
        DataValidationError: The path is not a regular file.
        OSError: The file cannot be opened.
    """
    try:
        file = open_regular(path)
    except IrregularFileError as error:
        raise DataValidationError(f"{path} cannot be read: {error.strerror}; write its rows to a file.") from None
    if file.peek(2)[:2] != b"\x1f\x8b":
        return file
    return io.BufferedReader(_UnpackGuard(file, path.name), buffer_size=2**17)


def sha256_of_input(path: Path) -> str:
    """Digest of a file's stored bytes; a packed file is not unpacked.

    Raises:
        DataValidationError: There is no such file, or it is not a regular file.
    """
    try:
        return sha256_of_file(path)
    except OSError as error:
        raise DataValidationError(f"{path} cannot be read ({error.strerror}); check the path.") from error


def open_text(path: Path, *, newline: str) -> TextIO:
    r"""The file's text, read as UTF-8. Bytes that are not UTF-8 become lone surrogates, which the row's check finds.

    With newline "", LF, CR and CR LF end a line; with "\n" only LF does. Line ends are kept in both cases.

    Raises:
        DataValidationError: The file is UTF-16.
    """
    file = open_bytes(path)
    if file.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff"):
        file.close()
        raise DataValidationError(f"{path.name} is UTF-16; save it as UTF-8 (iconv -f UTF-16 -t UTF-8).")
    return io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def numbered_lines(stream: TextIO) -> Iterator[Line]:
    """The stream's lines, counted from 1."""
    number = 0
    while text := stream.readline(MAX_LINE_CHARS):
        number += 1
        yield Line(number, text, _has_end(text))
        while not _has_end(text):
            text = stream.readline(MAX_LINE_CHARS)


def _has_end(text: str) -> bool:
    return len(text) < MAX_LINE_CHARS or text.endswith(("\n", "\r"))


def check_num_rows(name: str, num_rows: int, size: int) -> None:
    """Refuse a packed file with more rows than its size has room for."""
    if num_rows > max(FREE_ROWS, size // 2):
        raise DataValidationError(
            f"{name} has {num_rows:,} rows in {size:,} bytes, and different texts do not pack so small. If the file is "
            "right, land it as unpacked JSON lines."
        )


class _UnpackGuard(io.RawIOBase):
    """The content of a gzip file up to a limit, because a small file could unpack without end."""

    def __init__(self, packed: io.BufferedReader, name: str) -> None:
        self._packed = packed
        self._unpacked = gzip.GzipFile(fileobj=packed)
        self._name = name
        self._size = os.fstat(packed.fileno()).st_size
        self._left = max(MAX_UNPACKED_BYTES, MAX_UNPACKED_RATIO * self._size)
        self._num_lines = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._unpacked.readinto(buffer)
        self._left -= count
        if self._left < 0:
            raise DataValidationError(
                f"{self._name} unpacks to more than {MAX_UNPACKED_RATIO} times its size, which text does not. "
                "If the file is right, land it unpacked."
            )
        self._num_lines += bytes(buffer[:count]).count(b"\n")
        check_num_rows(self._name, self._num_lines, self._size)
        return count

    def close(self) -> None:
        self._unpacked.close()
        self._packed.close()
        super().close()
