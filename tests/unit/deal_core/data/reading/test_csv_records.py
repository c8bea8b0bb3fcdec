"""A CSV record without an end costs one row."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deal_core.data.reading import csv_records
from deal_core.data.reading.csv_records import CsvFile
from tests.hypothesis_settings import SHARED_FIXTURES

LINE_PARTS = st.sampled_from(["a", '"', ",", '""', '","', ' "', "x" * 7, "\r", "é"])
LINES = st.lists(st.lists(LINE_PARTS, max_size=4).map("".join), max_size=14)
HEADER = "text,label\n"
HEADERS = st.sampled_from([HEADER, "text, label\n", '"text, or",label\n'])


def rows_of(path: Path) -> list[tuple[int, bool, list[str]]]:
    """For each row: its line, whether it is bad, and its values."""
    with CsvFile(path) as file:
        return [
            (row.line or 0, row.fault is not None, [row.raw()] if row.fault else list(row.values.values()))
            for row, _ in file.rows()
        ]


def expected_rows(content: str, max_chars: int, drops_blanks: bool) -> Iterator[tuple[int, bool, list[str]]]:
    """The same by the literal rule: a line that begins no record is a bad row, and reading continues after it.

    Each try reads to its end, so a file of lines that open a quote is read once per line.
    """
    lines = content.splitlines(keepends=True)
    place = 0
    while place < len(lines):
        total = list(itertools.accumulate(len(line) for line in lines[place:]))
        fitting = [line for line, chars in zip(lines[place:], total, strict=True) if chars <= max_chars]
        left = iter(fitting)
        try:
            record = next(csv.reader(left, strict=True, skipinitialspace=drops_blanks))
        except (csv.Error, StopIteration):
            record, num_lines = None, 1
        else:
            num_lines = len(fitting) - len(list(left))
        text = "".join(lines[place : place + num_lines]).rstrip("\r\n")
        if record is None or len(record) > 1 or any(field.strip() for field in record):
            is_bad = record is None or len(record) != 2
            yield place + 2, is_bad, [text] if is_bad else record
        place += num_lines


@settings(SHARED_FIXTURES, max_examples=600)
@given(lines=LINES, header=HEADERS, ends_in_line_end=st.booleans(), max_chars=st.integers(18, 40))
def test_rows_are_those_of_the_rule(
    lines: list[str],
    header: str,
    ends_in_line_end: bool,
    max_chars: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """This holds for records above the bound too, where a later record reaches further than an earlier one."""
    lines = [line.replace("\r", "") for line in lines if len(line) < max_chars]
    content = "\n".join(lines) + "\n" * ends_in_line_end
    (tmp_path / "rows.csv").write_text(header + content)
    with monkeypatch.context() as patch:
        patch.setattr(csv_records, "MAX_LINE_CHARS", max_chars)
        assert rows_of(tmp_path / "rows.csv") == list(expected_rows(content, max_chars, header == "text, label\n"))
