"""Read CSV records one at a time, and continue after a record that cannot be read.

This project's own CSV files are for people who open them in a spreadsheet: no cell runs as a formula, and each is read
back as it was. A guarded cell has an apostrophe before it, as OWASP advises against CSV injection. Its row says so in a
column of its own, so an apostrophe in any other file stays a part of its text.
"""

from __future__ import annotations

import csv
import re
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

from deal_core.data.reading.lines import MAX_LINE_CHARS, Line, numbered_lines, open_text
from deal_core.data.rows import RawRow, Reason, unreadable_row
from deal_core.errors import DataValidationError

if TYPE_CHECKING:  # a process that only reads a file starts sooner without the settings
    from deal_core.data.schema import Doubt

_DELIMITERS = ",;\t"
_SEPARATOR = re.compile(r'"?sep=(.)"?\s*', re.IGNORECASE)
"""A first line that tells a spreadsheet the delimiter."""
MIN_SWALLOWED = 3
"""Lines of a quoted cell that read like rows, from which on a quote is probably missing."""
GUARD_COLUMN = "deal_guarded"
"""The column that says whether cells of the row are guarded. It is written only if any row has guarded cells."""
_LIKE_FORMULA = re.compile("'*[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")
"""The beginnings that spreadsheets take for formulas, also in full width. Cells that begin like guarded ones are
guarded too: otherwise a text with an apostrophe of its own would lose it."""


class CsvFile:
    """An open CSV file. Its header is read already; its rows can be read once.

    Quoted fields may hold line ends. A quote that is never closed would swallow the good rows after it. Therefore only
    the line with such a quote is a bad row, and reading continues with the next line.
    """

    def __init__(self, path: Path) -> None:
        # The limit is global and is never lowered, so two readers do not disturb each other.
        csv.field_size_limit(max(csv.field_size_limit(), 2 * MAX_LINE_CHARS))
        self._stream = open_text(path, newline="")
        self._feed = _Feed(numbered_lines(self._stream))
        try:
            first, delimiters = self._feed.peek(), _DELIMITERS
            if (separator := _SEPARATOR.fullmatch(first)) is not None:
                if separator[1] not in _DELIMITERS:
                    raise DataValidationError(
                        f"{path.name} begins with the line {separator[0].strip()!r}, and only commas, semicolons and "
                        "tabs separate cells; save it with one of these.",
                        code="csv-separator",
                    )
                self._feed.drop()
                first, delimiters = self._feed.peek(), separator[1]
            # The delimiter is the one that gives the header the most columns.
            delimiter = max(delimiters, key=lambda mark: len(_fields(first, mark, drops_blanks=False)))
            self._delimiter = delimiter
            fields, without_blanks = (_fields(first, delimiter, drops_blanks=drops) for drops in (False, True))
            # If a blank follows a delimiter of the header, the blanks are no part of the cells in the whole file.
            drops_blanks = fields[1:] != without_blanks[1:]
            self._reader = csv.reader(self._feed, delimiter=delimiter, strict=True, skipinitialspace=drops_blanks)
            lines, header = next(self._records(), ([], csv.Error("the file is empty")))
            if isinstance(header, csv.Error):  # the line is not quoted: without a header it is a row's text
                where = f"line {lines[0].number}: " if lines else ""
                raise DataValidationError(
                    f"{path.name} does not begin with a line that names its columns ({where}{header}); give it one."
                )
            self.header = tuple(name.strip() for name in header)
            self._first = header
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
            first, size = lines[0], sum([len(line.text) for line in lines])
            is_header = self._is_header(record)
            doubt: Doubt | None = "repeated header" if is_header else None
            if len(lines) >= MIN_SWALLOWED and self._reads_like_rows(lines):
                doubt = "swallowed rows"
            if isinstance(record, list) and len(record) == len(names) and not is_header:
                values = unguarded(dict(zip(names, record, strict=True)))
                yield RawRow(number, values, first.number, doubt=doubt), size
                continue
            fault = f"{len(record)} fields under {len(names)} columns" if isinstance(record, list) else str(record)
            fault = "the names of the columns once more" if is_header else fault
            reason: Reason = "malformed line" if first.is_whole else "over-long text"
            text = "".join([line.text for line in lines]).rstrip("\r\n")
            yield unreadable_row(number, first.number, text, fault, reason=reason)._replace(doubt=doubt), size

    def _is_header(self, record: list[str] | csv.Error) -> bool:
        """Whether a record is the header once more, which may have a mark of UTF-8 before it, as each file has."""
        if isinstance(record, csv.Error) or len(record) < 2 or record[-1] != self._first[-1]:
            return False
        return [record[0].removeprefix("\ufeff"), *record[1:]] == self._first

    def _reads_like_rows(self, lines: Sequence[Line]) -> bool:
        """Whether each line of a record has the delimiters of a row: then a stray quote may have swallowed rows."""
        num_delimiters = len(self.header) - 1
        return num_delimiters > 0 and all(
            line.text.count(self._delimiter) == num_delimiters for line in lines if line.text.strip()
        )

    def _records(self) -> Iterator[tuple[list[Line], list[str] | csv.Error]]:
        """Each record, or the error of reading it, with its lines."""
        while True:
            self._feed.start_record()
            try:
                record: list[str] | csv.Error = next(self._reader)
            except StopIteration:
                return
            except csv.Error as error:
                self._feed.give_back_all_but_first()
                record = error
            if isinstance(record, csv.Error) or len(record) > 1 or any(field.strip() for field in record):
                yield self._feed.taken, record


class _Feed:
    """Gives lines to csv.reader, and takes back the lines that a record without an end has swallowed."""

    def __init__(self, lines: Iterator[Line]) -> None:
        self._source = lines
        self._given_back: deque[Line] = deque()
        self._num_chars = 0
        self.taken: list[Line] = []
        """The lines of the record."""

    def __iter__(self) -> _Feed:
        return self

    def __next__(self) -> str:
        line = self._given_back.popleft() if self._given_back else next(self._source)
        self.taken.append(line)
        self._num_chars += len(line.text)
        if not line.is_whole or self._num_chars > MAX_LINE_CHARS:
            raise csv.Error(f"more than {MAX_LINE_CHARS} characters in a row")
        return line.text

    def start_record(self) -> None:
        self.taken, self._num_chars = [], 0

    def give_back_all_but_first(self) -> None:
        """Keep only the first line of the record."""
        self._given_back.extendleft(reversed(self.taken[1:]))
        del self.taken[1:]

    def drop(self) -> None:
        """Drop the line that `peek` has returned."""
        self._given_back.popleft()

    def peek(self) -> str:
        """The first line that is not blank; blank lines before it are dropped."""
        first = next((line for line in self._source if line.text.strip()), None)
        if first is None:
            return ""
        self._given_back.append(first)
        return first.text


def _fields(line: str, delimiter: str, *, drops_blanks: bool) -> list[str]:
    return next(csv.reader([line], delimiter=delimiter, skipinitialspace=drops_blanks), [])


def _distinct(header: tuple[str, ...]) -> list[str]:
    """Distinct names for all fields: a repeated name is numbered from its second occurrence on."""
    seen: Counter[str] = Counter()
    names = []
    for name in header:
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return names


def guarded(rows: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Put an apostrophe before each cell that a spreadsheet would run, and mark these rows."""
    safe = [{name: f"'{cell}" if _LIKE_FORMULA.match(cell) else cell for name, cell in row.items()} for row in rows]
    if safe == list(rows):
        return safe
    return [{**row, GUARD_COLUMN: str(row != before).lower()} for row, before in zip(safe, rows, strict=True)]


def unguarded(row: dict[str, str]) -> dict[str, str]:
    """Take the apostrophes of `guarded` off a row, and the mark. A row without the mark stays as it is.

    A cell without its apostrophe stays as it is too: some spreadsheets drop it when they save the file.
    """
    mark = row.get(GUARD_COLUMN)
    if mark is None:
        return row
    is_guarded = mark.strip().casefold() == "true"  # a spreadsheet writes TRUE
    return {
        name: cell[1:] if is_guarded and cell.startswith("'") and _LIKE_FORMULA.match(cell) else cell
        for name, cell in row.items()
        if name != GUARD_COLUMN
    }
