"""Read CSV records one at a time, and continue after a record that cannot be read."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Self

from deal_core.data.reading.lines import MAX_LINE_CHARS, Line, numbered_lines, open_text
from deal_core.data.rows import Problem, RawRow, Reason
from deal_core.errors import DataValidationError
from deal_core.safe_text import shorten

_DELIMITERS = ",;\t"


class CsvFile:
    """An open CSV file. Its header is read already; its rows can be read once.

    Quoted fields may hold line ends. A quote that is never closed would swallow the good rows after it. Therefore only
    the line with such a quote is a bad row, and reading continues with the next line.
    """

    def __init__(self, path: Path) -> None:
        # The limit is global and is never lowered, so two readers do not disturb each other.
        csv.field_size_limit(max(csv.field_size_limit(), 2 * MAX_LINE_CHARS))
        self._name = path.name
        self._stream = open_text(path, newline="")
        self._feed = _Feed(numbered_lines(self._stream))
        try:
            self._feed.delimiter = _find_delimiter(self._feed.peek())
            self._reader = csv.reader(self._feed, delimiter=self._feed.delimiter, strict=True, skipinitialspace=True)
            self.header = self._read_header()
        except BaseException:
            self._stream.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.close()

    def rows(self) -> Iterator[tuple[RawRow, int]]:
        """The rows under the header, each with its number of characters; blank lines are skipped."""
        names = _distinct(self.header)
        for number, (lines, record) in enumerate(self._records(), start=1):
            if isinstance(record, csv.Error) or len(record) != len(names):
                text = "".join([line.text for line in lines]).rstrip("\r\n")
                fault = self._problem(record, lines[0], text)
                row = RawRow(number, {}, lines[0].number, fault, whole=partial(str, text))
            else:
                row = RawRow(number, dict(zip(names, record, strict=True)), lines[0].number)
            yield row, sum([len(line.text) for line in lines])

    def _records(self) -> Iterator[tuple[list[Line], list[str] | csv.Error]]:
        """Each record, or the error of reading it, with its lines."""
        while True:
            self._feed.start_record()
            try:
                record: list[str] | csv.Error = next(self._reader)
            except StopIteration:
                return
            except csv.Error as error:
                self._feed.give_back_all_but_first(error)
                record = error
            if isinstance(record, csv.Error) or len(record) > 1 or any(field.strip() for field in record):
                yield self._feed.taken, record

    def _read_header(self) -> tuple[str, ...]:
        lines, record = next(self._records(), ([], csv.Error("the file is empty")))
        if isinstance(record, csv.Error):  # the line is not quoted: without a header it is a row's text
            where = f"line {lines[0].number}: " if lines else ""
            raise DataValidationError(
                f"{self._name} does not begin with a line that names its columns ({where}{record}); give it one."
            )
        return tuple(name.strip() for name in record)

    def _problem(self, record: list[str] | csv.Error, first: Line, text: str) -> Problem:
        if isinstance(record, csv.Error):
            reason: Reason = "malformed line" if first.is_whole else "over-long text"
            return Problem(reason, f"{record}: {shorten(text.rstrip())}", str(record))
        why = f"{len(record)} fields under {len(self.header)} columns"
        return Problem("malformed line", f"{why}: {shorten(text)}", why)


class _Feed:
    """Gives lines to csv.reader, and takes back the lines that a record without an end has swallowed.

    The result of reading on is remembered: it holds for every later record that is still open at the same lines. So
    each line is read a fixed number of times, even in a file with many unclosed quotes.
    """

    def __init__(self, lines: Iterator[Line]) -> None:
        self.delimiter = _DELIMITERS[0]
        self._source = lines
        self._buffer: list[Line] = []
        self._base = 0
        """Place of the buffer's first line; places count from the first line of the file."""
        self._start = self._place = 0
        """Places of the record's first line and of the next line."""
        self._start_chars = self._first_chars = self._chars = 0
        """Characters of the file before the record, up to the end of its first line, and up to the next line."""
        self._open_end = self._open_chars = 0
        """A place, and the characters of the file before it. A quoted field that is open after the record's first line
        is still open at this place."""
        self._fate: csv.Error | Line | None = None
        """Effect of the line at `_open_end` on the open field: the error of reading on, or the line if it closes the
        field. None: not known."""

    def __iter__(self) -> _Feed:
        return self

    def __next__(self) -> str:
        place = self._place
        if self._start < place < self._open_end:
            self._raise_if_never_closed()
        line = self._line_at(place)
        if line is None:
            raise StopIteration
        text = line.text
        self._place = place + 1
        self._chars += len(text)
        if place == self._start:
            self._first_chars = self._chars
        if not line.is_whole or self._chars - self._start_chars > MAX_LINE_CHARS:
            raise _too_long()
        return text

    @property
    def taken(self) -> list[Line]:
        return self._buffer[self._start - self._base : self._place - self._base]

    def start_record(self) -> None:
        self._start, self._start_chars = self._place, self._chars
        num_done = self._place - self._base
        if 2 * num_done > len(self._buffer):
            del self._buffer[:num_done]
            self._base = self._place

    def give_back_all_but_first(self, error: csv.Error) -> None:
        """Keep only the first line of the record, because reading on failed with this error."""
        last = self._place - 1
        if last > self._open_end:
            line = self._buffer[last - self._base]
            self._open_end, self._open_chars = last, self._chars - len(line.text)
            self._fate = None if line.is_whole and self._is_too_long(self._chars) else error
        self._place, self._chars = self._start + 1, self._first_chars

    def peek(self) -> str:
        """The first line that is not blank; blank lines before it are dropped."""
        while (line := self._line_at(self._place)) and not line.text.strip():
            self._place += 1
            self.start_record()
        return line.text if line else ""

    def _line_at(self, place: int) -> Line | None:
        """The line at a place in the buffer or directly after it; None at the end of the file."""
        if place == self._base + len(self._buffer):
            line = next(self._source, None)
            if line is None:
                return None
            self._buffer.append(line)
        return self._buffer[place - self._base]

    def _raise_if_never_closed(self) -> None:
        """Raise the error that reading on would give, if the open field does not end within the record's bound."""
        while self._fate is None and not self._is_too_long(self._open_chars):
            line = self._line_at(self._open_end)
            if line is None:
                self._fate = csv.Error("unexpected end of data")
            elif not line.is_whole:
                self._fate = _too_long()
            else:
                self._fate = self._closed_by(line)
                if self._fate is None:
                    self._open_end += 1
                    self._open_chars += len(line.text)
        closing = len(self._fate.text) if isinstance(self._fate, Line) else 0
        if self._is_too_long(self._open_chars + closing):
            raise _too_long()
        if isinstance(self._fate, csv.Error):
            raise csv.Error(*self._fate.args)

    def _closed_by(self, line: Line) -> csv.Error | Line | None:
        """The line if it closes an open field, or the error of reading it; None if the field stays open."""
        lines = iter([f'"{line.text}', '"'])
        try:
            next(csv.reader(lines, delimiter=self.delimiter, strict=True, skipinitialspace=True))
        except csv.Error as error:
            return error
        return line if next(lines, None) else None

    def _is_too_long(self, chars: int) -> bool:
        """Whether a record that ends after `chars` characters of the file is too long."""
        return chars - self._start_chars > MAX_LINE_CHARS


def _too_long() -> csv.Error:
    return csv.Error(f"more than {MAX_LINE_CHARS} characters in a row")


def _find_delimiter(header: str) -> str:
    """The delimiter (comma, semicolon or tab) that gives the header the most columns."""

    def count_columns(delimiter: str) -> int:
        return len(next(csv.reader([header], delimiter=delimiter), []))

    return max(_DELIMITERS, key=count_columns)


def _distinct(header: tuple[str, ...]) -> list[str]:
    """Distinct names for all fields: a repeated name is numbered from its second occurrence on."""
    seen: Counter[str] = Counter()
    names = []
    for name in header:
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return names
