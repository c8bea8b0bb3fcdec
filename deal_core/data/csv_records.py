"""CSV records one at a time, and back on its feet after a record that cannot be read."""

from __future__ import annotations

import csv
from collections import Counter, deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from deal_core.data.lines import MAX_LINE_CHARS, Line, numbered_lines, open_text
from deal_core.data.rows import Problem, RawRow, Reason, shorten
from deal_core.errors import DataValidationError

_DELIMITERS = ",;\t"


class CsvFile:
    """An open CSV file: its header is read, its rows can be read once.

    Quoted fields may hold line ends. A quote that is never closed would swallow the good rows after it: then only the
    line with the quote is a bad row, and reading goes on with the line after it.
    """

    def __init__(self, path: Path) -> None:
        # The limit belongs to the process and is never lowered, so that two readers do not disturb each other.
        csv.field_size_limit(max(csv.field_size_limit(), 2 * MAX_LINE_CHARS))
        self._name = path.name
        self._stream = open_text(path, newline="")
        self._feed = _Feed(numbered_lines(self._stream))
        try:
            delimiter = _find_delimiter(self._feed.peek())
            self._reader = csv.reader(self._feed, delimiter=delimiter, strict=True, skipinitialspace=True)
            self.header = self._read_header()
        except BaseException:
            self._stream.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()

    def rows(self) -> Iterator[tuple[RawRow, int]]:
        """The rows under the header, and how many characters each takes; blank lines are no rows."""
        names = _distinct(self.header)
        for number, (lines, record) in enumerate(self._records(), start=1):
            if isinstance(record, csv.Error) or len(record) != len(names):
                text = "".join(line.text for line in lines).rstrip("\r\n")
                row = RawRow(
                    number=number,
                    line=lines[0].number,
                    values={},
                    fault=self._problem(record, lines[0], text),
                    whole=partial(str, text),
                )
            else:
                row = RawRow(number=number, line=lines[0].number, values=dict(zip(names, record, strict=True)))
            yield row, sum(len(line.text) for line in lines)

    def _records(self) -> Iterator[tuple[list[Line], list[str] | csv.Error]]:
        """Each record, or why there is none, with the lines it was read from."""
        while True:
            self._feed.start_record()
            try:
                record: list[str] | csv.Error = next(self._reader)
            except StopIteration:
                return
            except csv.Error as error:
                self._feed.give_back_all_but_first()
                record = error
            if isinstance(record, csv.Error) or any(field.strip() for field in record) or len(record) > 1:
                yield self._feed.taken, record

    def _read_header(self) -> tuple[str, ...]:
        lines, record = next(self._records(), ([], csv.Error("the file is empty")))
        if isinstance(record, csv.Error):  # said without the line, which is a row's text where there is no header
            where = f"line {lines[0].number}: " if lines else ""
            raise DataValidationError(
                f"{self._name} does not begin with a line that names its columns ({where}{record}); give it one."
            )
        return tuple(name.strip() for name in record)

    def _problem(self, record: list[str] | csv.Error, first: Line, text: str) -> Problem:
        if isinstance(record, csv.Error):
            reason: Reason = "malformed line" if first.is_whole else "over-long text"
            return Problem(reason, f"{record}: {shorten(text.rstrip())}")
        return Problem("malformed line", f"{len(record)} fields under {len(self.header)} columns: {shorten(text)}")


class _Feed:
    """Gives lines to csv.reader, and takes back those that it should not have swallowed."""

    def __init__(self, lines: Iterator[Line]) -> None:
        self._lines = lines
        self._waiting: deque[Line] = deque()
        self._num_chars = 0
        self.taken: list[Line] = []

    def __iter__(self) -> _Feed:
        return self

    def __next__(self) -> str:
        line = self._waiting.popleft() if self._waiting else next(self._lines)
        self.taken.append(line)
        self._num_chars += len(line.text)
        if not line.is_whole or self._num_chars > MAX_LINE_CHARS:
            raise csv.Error(f"more than {MAX_LINE_CHARS} characters in a row")
        return line.text

    def start_record(self) -> None:
        self.taken = []
        self._num_chars = 0

    def give_back_all_but_first(self) -> None:
        self._waiting.extendleft(reversed(self.taken[1:]))
        del self.taken[1:]

    def peek(self) -> str:
        """The first line that is not blank; the blank ones before it are dropped."""
        for line in self._lines:
            if line.text.strip():
                self._waiting.append(line)
                return line.text
        return ""


def _find_delimiter(header: str) -> str:
    """The one of comma, semicolon and tab that gives the header the most columns."""

    def count_columns(delimiter: str) -> int:
        return len(next(csv.reader([header], delimiter=delimiter), []))

    return max(_DELIMITERS, key=count_columns)


def _distinct(header: tuple[str, ...]) -> list[str]:
    """Names to keep every field under: a doubled name is numbered from its second occurrence on."""
    seen: Counter[str] = Counter()
    names = []
    for name in header:
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return names
