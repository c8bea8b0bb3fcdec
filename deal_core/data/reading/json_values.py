"""JSON with unique keys, and the rows of a file that is one JSON list, read piece by piece."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from deal_core.data.reading.lines import MAX_LINE_CHARS, open_text
from deal_core.data.rows import Problem, RawRow
from deal_core.errors import DataValidationError
from deal_core.safe_text import shorten

_LIST_OF_ROWS = re.compile(r"\[\s*(\{|$)")
_BLANKS = re.compile(r"[ \t\n\r]*")
_PIECE_CHARS = 2**18


def begins_like_list(first_line: str) -> bool:
    """Whether the first line of a file begins a list of objects, and not a line of JSON lines."""
    return _LIST_OF_ROWS.match(first_line) is not None


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: The text is not JSON, or an object has a key twice.
    """
    try:
        values, end = _DECODER.raw_decode(text)
        if end == len(text):
            return values
    except ValueError:
        pass
    return json.loads(text, object_pairs_hook=unique_keys)  # raises json's own message


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


def why_unreadable(error: ValueError) -> str:
    """The error of `parse_json` without a word of the text."""
    if isinstance(error, json.JSONDecodeError):
        return str(error)
    return "a key occurs twice" if str(error).startswith("key ") else "a number has too many digits"


_DECODER = json.JSONDecoder(object_pairs_hook=unique_keys)
_LENIENT = json.JSONDecoder(parse_int=str)


def read_json_list(path: Path) -> Iterator[tuple[RawRow, int]]:
    """The rows of a file that is a JSON list of objects, each with its number of characters.

    Only the current piece of the file is in memory. A list that is not JSON cannot be read beyond the fault.

    Raises:
        DataValidationError: The list is not JSON, does not end, or has an item of more than MAX_LINE_CHARS characters.
    """
    with open_text(path, newline="\n") as stream:
        text = _Window(stream, path.name)
        text.take("[")
        number = 0
        while not text.is_next("]"):
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
        self._is_whole = False

    def is_next(self, mark: str) -> bool:
        """Whether a mark is the next character that is not blank."""
        self._skip_blanks()
        return self._text.startswith(mark, self._place)

    def take(self, mark: str) -> None:
        """Go behind a mark."""
        if not self.is_next(mark):
            found = "the file ends" if self._is_at_end() else "other text stands there"
            raise self._broken(f"{mark} is missing, and {found}")
        self._go_to(self._place + 1)

    def end(self) -> None:
        """Check that the text ends here."""
        self._skip_blanks()
        if not self._is_at_end():
            raise self._broken("text follows the end of the list")

    def row(self, number: int) -> tuple[RawRow, int]:
        """The next item as a row, and its number of characters."""
        self._skip_blanks()
        while True:
            try:
                value, end, error = self._decode()
                if end < len(self._text) or self._is_whole:
                    return self._row(number, value, end, error)
            except json.JSONDecodeError as error:
                if self._is_whole:
                    raise self._broken(error.msg) from None
            if len(self._text) - self._place > MAX_LINE_CHARS:
                raise self._broken(f"item {number} is not JSON, or has more than {MAX_LINE_CHARS} characters")
            self._read()

    def _decode(self) -> tuple[object, int, ValueError | None]:
        """The next value, its end, and what is wrong with its content if it is JSON all the same."""
        try:
            return *_DECODER.raw_decode(self._text, self._place), None
        except json.JSONDecodeError:
            raise
        except ValueError as error:
            return None, _LENIENT.raw_decode(self._text, self._place)[1], error

    def _row(self, number: int, value: object, end: int, error: ValueError | None) -> tuple[RawRow, int]:
        line, size = self._line, end - self._place
        text = self._text[self._place : end]
        self._go_to(end)
        if error is None and isinstance(value, dict):
            return RawRow(number, value, line), size
        shown = "not an object of columns" if error is None else shorten(str(error))
        why = shown if error is None else why_unreadable(error)
        fault = Problem("malformed line", f"{shown}: {shorten(text)}", why)
        return RawRow(number, {}, line, fault, whole=partial(str, text)), size

    def _skip_blanks(self) -> None:
        while True:
            found = _BLANKS.match(self._text, self._place)
            assert found is not None, "the pattern matches nothing, too"
            self._go_to(found.end())
            if self._place < len(self._text) or self._is_whole:
                return
            self._read()

    def _go_to(self, place: int) -> None:
        self._line += self._text.count("\n", self._place, place)
        self._place = place

    def _read(self) -> None:
        """Read on; the piece doubles with the item, so a long item is parsed a few times only."""
        left = self._text[self._place :]
        piece = self._stream.read(max(_PIECE_CHARS, len(left)))
        self._is_whole = not piece
        self._text, self._place = left + piece, 0

    def _is_at_end(self) -> bool:
        return self._is_whole and self._place == len(self._text)

    def _broken(self, why: str) -> DataValidationError:
        return DataValidationError(
            f"{self._name} is a JSON list that cannot be read (line {self._line}: {why}); correct it, or write one "
            "object a line: then only that line is a bad row."
        )
