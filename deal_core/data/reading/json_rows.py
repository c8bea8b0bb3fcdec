"""The rows of JSON lines, and of a file that is one JSON list, read piece by piece. The keys of a row are unique.

No library reads the list. One that streams, such as ijson, refuses the whole file for one byte that is not UTF-8,
replaces lone surrogates, and drops repeated keys without a word.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

from deal_core.data.reading.lines import MAX_LINE_CHARS, numbered_lines, open_text
from deal_core.data.rows import RawRow, unreadable_row
from deal_core.errors import DataValidationError
from deal_core.safe_text import shorten

_LIST_OF_ROWS = re.compile(r"\[\s*(\{|$)")
_EMPTY_LIST = re.compile(r"\[\s*\]")
_MARK = re.compile(r"[^ \t\n\r]")
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
            for number, text, is_whole in chain(first, lines):
                if is_whole:
                    row = _row(number, number, text.strip())
                else:
                    fault = f"more than {MAX_LINE_CHARS} characters in a line"
                    row = unreadable_row(number, number, text.strip(), fault, reason="over-long text")
                yield row, len(text)
            return
    with open_text(path, newline="\n") as stream:
        for number, (line, text) in enumerate(_List(stream, path.name).items(), start=1):
            yield _row(number, line, text), len(text)


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
"""Finds the end of a value that is JSON, also if `_DECODER` refuses it."""


def _row(number: int, line: int, text: str) -> RawRow:
    """The row of a text, which may be anything."""
    try:
        values = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        return unreadable_row(number, line, text, shorten(str(error)), str(error))
    except ValueError as error:
        why = "a key occurs twice" if str(error).startswith("key ") else "a number has too many digits"
        return unreadable_row(number, line, text, shorten(str(error)), why)
    except RecursionError:
        return unreadable_row(number, line, text, "nested too deeply")
    if not isinstance(values, dict):
        return unreadable_row(number, line, text, "not an object of columns")
    if text.count("[") + text.count("{") > MAX_DEPTH and _is_deeper(values, MAX_DEPTH):
        return unreadable_row(number, line, text, "nested too deeply")
    return RawRow(number, values, line)


def _is_deeper(value: object, num_levels: int) -> bool:
    if not isinstance(value, (dict, list)):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return num_levels == 0 or any(_is_deeper(item, num_levels - 1) for item in inner)


class _List:
    """A JSON list, of which only one piece is in memory."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream, self._name = stream, name
        self._text, self._place, self._line = "", 0, 1

    def items(self) -> Iterator[tuple[int, str]]:
        """The line and the text of each item."""
        self._take("[")
        number = 0
        while self._next_mark() != "]":
            if number:
                self._take(",")
                self._next_mark()
            number += 1
            yield self._line, self._item(number)
        self._take("]")
        if self._next_mark():
            raise self._broken("text follows the end of the list")

    def _next_mark(self) -> str:
        """Go to the next character that is not blank, and return it; it is empty at the end of the file."""
        while True:
            mark = _MARK.search(self._text, self._place)
            self._go_to(mark.start() if mark else len(self._text))
            if mark or not self._read():
                return self._text[self._place : self._place + 1]

    def _take(self, wanted: str) -> None:
        mark = self._next_mark()
        if mark != wanted:
            raise self._broken(f"{wanted} is missing, and {'other text stands there' if mark else 'the file ends'}")
        self._place += 1

    def _item(self, number: int) -> str:
        """The text of the item that begins here."""
        is_last = False
        while True:
            try:
                start, end = self._place, _LENIENT.raw_decode(self._text, self._place)[1]
                if is_last or end < len(self._text):  # else the next piece may go on with the value
                    self._go_to(end)
                    return self._text[start:end]
            except json.JSONDecodeError as error:
                if is_last:
                    raise self._broken(error.msg) from None
            if len(self._text) - self._place > MAX_LINE_CHARS:
                raise self._broken(f"item {number} is not JSON, or has more than {MAX_LINE_CHARS} characters")
            is_last = not self._read()

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
