"""Bytes and lines of a text file, plain or gzip, with a bound on what one line, and one small file, can become."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from deal_core.errors import DataValidationError
from deal_core.regular_file import IrregularFileError, open_regular

MAX_LINE_CHARS = 4 * 2**20
"""The rest of a longer line is skipped."""
MAX_SKIPPED_CHARS = 256 * 2**20
"""A file with a line longer still is refused: it holds no rows of text."""
MAX_EMPTY_LINES = 1_000_000
"""A file with more empty lines in a row is refused: a small gzip file can hold billions of them."""
MAX_UNPACKED_BYTES = 2**28
MAX_UNPACKED_RATIO = 200
"""A gzip file may unpack to MAX_UNPACKED_BYTES or to this many times its size, whichever is more. Text packs 2 to 20
times, a gzip bomb 1000 times."""
FREE_ROWS = 100_000
"""A packed file may have as many rows, and more where it has two bytes for each. Rows that repeat others are bad, and
different ones take more."""


class Line(NamedTuple):
    """A line with its end; `is_whole` is False where only its beginning was kept."""

    number: int
    text: str
    is_whole: bool


def open_bytes(path: Path) -> io.BufferedReader:
    """The file's bytes, unpacked where its first bytes are those of gzip, whatever its name.

    Raises:
        DataValidationError: It is no regular file.
        OSError: It cannot be opened.
    """
    try:
        file = open_regular(path)
    except IrregularFileError as error:
        raise DataValidationError(f"{path} cannot be read: {error.strerror}; write its rows to a file.") from None
    if file.peek(2)[:2] != b"\x1f\x8b":
        return file
    return io.BufferedReader(_UnpackGuard(file, path.name), buffer_size=2**17)


def sha256_of_file(path: Path) -> str:
    """Digest of a file's bytes as they lie there, packed or not.

    Raises:
        DataValidationError: There is no such file, or it is no regular one.
    """
    try:
        with open_regular(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataValidationError(f"{path} cannot be read ({error.strerror}); check the path.") from error


def open_text(path: Path, *, newline: str) -> TextIO:
    r"""The file's text, read as UTF-8. Bytes that are not UTF-8 become lone surrogates, for the row's check to find.

    Args:
        path: The file.
        newline: "" lets each of LF, CR and CR LF end a line, "\n" only LF; line ends are kept either way.

    Raises:
        DataValidationError: The file is UTF-16.
    """
    file = open_bytes(path)
    if file.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff"):
        file.close()
        raise DataValidationError(f"{path.name} is UTF-16; save it as UTF-8 (iconv -f UTF-16 -t UTF-8).")
    return io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def numbered_lines(stream: TextIO) -> Iterator[Line]:
    """The stream's lines, counted from 1.

    Raises:
        DataValidationError: A line goes on for more than MAX_SKIPPED_CHARS, or MAX_EMPTY_LINES are empty in a row.
    """
    number = num_empty = 0
    while text := stream.readline(MAX_LINE_CHARS):
        number += 1
        num_empty = num_empty + 1 if len(text) < 3 and text.isspace() else 0
        if num_empty > MAX_EMPTY_LINES:
            raise DataValidationError(
                f"The {MAX_EMPTY_LINES:,} lines before line {number} are empty, which is no file of rows; remove them."
            )
        ends = len(text) < MAX_LINE_CHARS or text.endswith(("\n", "\r"))
        yield Line(number, text, ends)
        skipped = 0
        while not ends and (rest := stream.readline(MAX_LINE_CHARS)):
            ends = rest.endswith(("\n", "\r"))
            skipped += len(rest)
            if skipped > MAX_SKIPPED_CHARS:
                raise DataValidationError(
                    f"Line {number} has more than {MAX_SKIPPED_CHARS // 2**20} million characters, which is no row of "
                    "text; write the file again with one row a line."
                )


def too_many_rows(name: str, num_rows: int, size: int) -> DataValidationError | None:
    """What is said of a packed file with more rows than its size has room for; None where it is as it should be."""
    if num_rows <= max(FREE_ROWS, size // 2):
        return None
    return DataValidationError(
        f"{name} has {num_rows:,} rows in {size:,} bytes, and texts that differ do not pack so small; if that is "
        "meant, land them as JSON lines, unpacked."
    )


class _UnpackGuard(io.RawIOBase):
    """The content of a gzip file, up to a limit: a small file must not unpack for ever."""

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
                f"{self._name} unpacks to more than {MAX_UNPACKED_RATIO} times its size, which text does not; "
                "if that is meant, land it unpacked."
            )
        self._num_lines += bytes(buffer[:count]).count(b"\n")
        if problem := too_many_rows(self._name, self._num_lines, self._size):
            raise problem
        return count

    def close(self) -> None:
        self._unpacked.close()
        self._packed.close()
        super().close()
