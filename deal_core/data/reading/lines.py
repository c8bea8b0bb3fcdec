"""Bytes and lines of a text file, plain or gzip, with a bound on the size of a line."""

from __future__ import annotations

import gzip
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TextIO

from deal_core.errors import DataValidationError
from deal_core.regular_file import IrregularFileError, open_regular, sha256_of_file
from deal_core.safe_text import shorten

MAX_LINE_CHARS = 4 * 2**20
"""Longest line; the rest of a longer line is skipped."""


_WIDE = {
    "UTF-32": rb"\xff\xfe\0\0|\0\0\xfe\xff",
    "UTF-16": rb"\xff\xfe|\xfe\xff",
    "UTF-32LE": rb"[^\0]\0\0\0",
    "UTF-32BE": rb"\0\0\0[^\0]",
    "UTF-16LE": rb"[^\0]\0[^\0]\0",
    "UTF-16BE": rb"\0[^\0]\0[^\0]",
}
"""Encodings with two or four bytes a character, as iconv calls them, and how their files begin: with a mark of their
own, or with an ASCII character."""


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
    return io.BufferedReader(_Unpacked(file), buffer_size=2**17)


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
        DataValidationError: The file is UTF-16 or UTF-32.
    """
    file = open_bytes(path)
    beginning = file.peek(4)[:4]
    encoding = next((name for name, pattern in _WIDE.items() if re.match(pattern, beginning, re.DOTALL)), None)
    if encoding is not None:
        file.close()
        raise DataValidationError(
            f"{path.name} is {encoding}; save it as UTF-8 (iconv -f {encoding} -t UTF-8).", code="encoding"
        )
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


def damaged_file(path: Path, error: Exception) -> DataValidationError:
    """The refusal of a file that its reader does not understand; the error's first line says why."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return DataValidationError(
        f"{path.name} cannot be read, it is damaged or was cut off ({shorten(reason, 160)}); write or upload it again."
    )


class _Unpacked(gzip.GzipFile):
    """The content of a gzip file; to close it closes the file too."""

    def __init__(self, packed: io.BufferedReader) -> None:
        super().__init__(fileobj=packed)
        self._packed = packed

    def seekable(self) -> bool:
        """Return False: to seek would be to unpack the file again."""
        return False

    def close(self) -> None:
        super().close()
        self._packed.close()
