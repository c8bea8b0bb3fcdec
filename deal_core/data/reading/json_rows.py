"""The rows of JSON lines, and of a file that is one JSON list, read piece by piece. The keys of a row are unique."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

from deal_core.data.reading.lines import MAX_LINE_CHARS, Line, numbered_lines, open_text
from deal_core.data.rows import RawRow, unreadable_row
from deal_core.errors import DataValidationError
from deal_core.safe_text import shorten

_LIST_OF_ROWS = re.compile(r"\[\s*(\{|$)")
_EMPTY_LIST = re.compile(r"\[\s*\]")
_BLANKS = re.compile(r"[ \t\n\r]*")
_PIECE_CHARS = 2**18
MAX_DEPTH = 100
"""Levels of a row. What is nested deeper than this cannot be passed on by every version of Python."""


def read_json(path: Path) -> Iterator[tuple[RawRow, int]]:
    """The rows of JSON lines or of a JSON list of objects, each with its number of characters.

    Only the current line, or the current piece of a list, is in memory. A list that is not JSON cannot be read beyond
    the fault.

    Raises:
        DataValidationError: A list is not JSON, does not end, or has an item of more than MAX_LINE_CHARS characters. Or
            the file begins with an object over several lines.
    """
    with open_text(path, newline="\n") as stream:
        lines = (line for line in numbered_lines(stream) if line.text.strip())
        first = list(islice(lines, 2))
        beginning, following = (*(line.text.strip() for line in first), "", "")[:2]
        if beginning == "{" and following.startswith(('"', "}")):
            raise DataValidationError(
                f"{path.name} begins with one JSON object over several lines; write a list of rows ([{{…}}, {{…}}]) "
                "or one object per line."
            )
        if not following and _EMPTY_LIST.fullmatch(beginning):
            return
        if _LIST_OF_ROWS.match(beginning) is None:
            for line in chain(first, lines):
                yield _row_of_line(line), len(line.text)
            return
    with open_text(path, newline="\n") as stream:
        yield from _rows_of_list(_Window(stream, path.name))


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object of these pairs, for `object_pairs_hook`.

    Raises:
        ValueError: A key occurs twice.
    """
    values = dict(pairs)
    if len(values) < len(pairs):
        name, count = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"key {shorten(name, 40)!r} {count} times")
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=unique_keys)
_LENIENT = json.JSONDecoder(parse_int=str)


def _row_of_line(line: Line) -> RawRow:
    text = line.text.strip()
    if not line.is_whole:
        found = f"more than {MAX_LINE_CHARS} characters in a line"
        return unreadable_row(line.number, line.number, text, found, reason="over-long text")
    try:
        values = _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        return _unreadable(line.number, line.number, text, error)
    if not isinstance(values, dict):
        return _unreadable(line.number, line.number, text, None)
    if _is_deep(values, text):
        return _unreadable(line.number, line.number, text, RecursionError())
    return RawRow(line.number, values, line.number)


def _is_deep(values: dict[str, Any], text: str) -> bool:
    """Whether the values of this text are nested more deeply than MAX_DEPTH."""
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return False
    level: list[Any] = [values]
    for _ in range(MAX_DEPTH):
        inner = (value for each in level for value in (each.values() if isinstance(each, dict) else each))
        level = [value for value in inner if isinstance(value, (dict, list))]
    return bool(level)


def _unreadable(number: int, line: int, text: str, error: Exception | None) -> RawRow:
    """The row of a text that is no JSON object with unique keys; None: it is another JSON value."""
    if error is None:
        return unreadable_row(number, line, text, "not an object of columns")
    if isinstance(error, RecursionError):
        return unreadable_row(number, line, text, "nested too deeply")
    why = "a key occurs twice" if str(error).startswith("key ") else "a number has too many digits"
    if isinstance(error, json.JSONDecodeError):
        why = str(error)
    return unreadable_row(number, line, text, shorten(str(error)), why)


def _rows_of_list(text: _Window) -> Iterator[tuple[RawRow, int]]:
    text.take("[")
    number = 0
    while text.next_mark() != "]":
        if number:
            text.take(",")
        number += 1
        yield text.row(number)
    text.take("]")
    text.end()


class _Window:
    """The part of a JSON text that is in memory."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream = stream
        self._name = name
        self._text = ""
        self._place = 0
        self._line = 1

    def next_mark(self) -> str:
        """The next character that is not blank; empty at the end of the file."""
        while True:
            found = _BLANKS.match(self._text, self._place)
            assert found is not None, "the pattern matches nothing, too"
            self._go_to(found.end())
            if self._place < len(self._text) or not self._read():
                return self._text[self._place : self._place + 1]

    def take(self, mark: str) -> None:
        """Go behind a mark."""
        found = self.next_mark()
        if found != mark:
            raise self._broken(f"{mark} is missing, and {'other text stands there' if found else 'the file ends'}")
        self._place += 1

    def end(self) -> None:
        """Check that the text ends here."""
        if self.next_mark():
            raise self._broken("text follows the end of the list")

    def row(self, number: int) -> tuple[RawRow, int]:
        """The next item as a row, and its number of characters."""
        self.next_mark()
        is_whole = False
        while True:
            try:
                value, end, error = self._decode()
                if is_whole or end < len(self._text):
                    return self._row(number, value, end, error)
            except json.JSONDecodeError as broken:
                if is_whole:
                    raise self._broken(broken.msg) from None
            if len(self._text) - self._place > MAX_LINE_CHARS:
                raise self._broken(f"item {number} is not JSON, or has more than {MAX_LINE_CHARS} characters")
            is_whole = not self._read()

    def _decode(self) -> tuple[object, int, ValueError | None]:
        """The next value, its end, and what is wrong with its content if it is JSON all the same."""
        try:
            return *_DECODER.raw_decode(self._text, self._place), None
        except json.JSONDecodeError:
            raise
        except ValueError as error:
            return None, _LENIENT.raw_decode(self._text, self._place)[1], error

    def _row(self, number: int, value: object, end: int, error: Exception | None) -> tuple[RawRow, int]:
        line, text = self._line, self._text[self._place : end]
        self._go_to(end)
        if error is None and isinstance(value, dict):
            if not _is_deep(value, text):
                return RawRow(number, value, line), len(text)
            error = RecursionError()
        return _unreadable(number, line, text, error), len(text)

    def _go_to(self, place: int) -> None:
        self._line += self._text.count("\n", self._place, place)
        self._place = place

    def _read(self) -> bool:
        """Read on; return whether there was more. The piece grows with the item, so it is parsed a few times only."""
        left = self._text[self._place :]
        piece = self._stream.read(max(_PIECE_CHARS, len(left)))
        self._text, self._place = left + piece, 0
        return bool(piece)

    def _broken(self, why: str) -> DataValidationError:
        return DataValidationError(
            f"{self._name} is a JSON list that cannot be read (line {self._line}: {why}); correct it, or write one "
            "object a line: then only that line is a bad row."
        )
