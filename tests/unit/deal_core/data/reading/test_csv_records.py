"""A CSV record without an end costs one row, and the file is read only a fixed number of times."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deal_core.data.reading import csv_records
from deal_core.data.reading.csv_records import CsvFile
from deal_core.data.reading.lines import Line, numbered_lines

LINE_PARTS = st.sampled_from(["a", '"', ",", '""', '","', ' "', "x" * 7, "\r", "é"])
LINES = st.lists(st.lists(LINE_PARTS, max_size=4).map("".join), max_size=14)
HEADER = "text,label\n"


def rows_of(path: Path) -> list[tuple[int, bool, list[str]]]:
    """For each row: its line, whether it is bad, and its values."""
    with CsvFile(path) as file:
        return [
            (row.line or 0, row.fault is not None, [row.raw()] if row.fault else list(row.values.values()))
            for row, _ in file.rows()
        ]


def expected_rows(content: str, max_chars: int) -> Iterator[tuple[int, bool, list[str]]]:
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
            record = next(csv.reader(left, strict=True, skipinitialspace=True))
        except (csv.Error, StopIteration):
            record, num_lines = None, 1
        else:
            num_lines = len(fitting) - len(list(left))
        text = "".join(lines[place : place + num_lines]).rstrip("\r\n")
        if record is None or len(record) > 1 or any(field.strip() for field in record):
            is_bad = record is None or len(record) != 2
            yield place + 2, is_bad, [text] if is_bad else record
        place += num_lines


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=LINES, ends_in_line_end=st.booleans(), max_chars=st.integers(12, 40))
def test_rows_are_those_of_the_rule(
    lines: list[str], ends_in_line_end: bool, max_chars: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This holds for records above the bound too, where a later record reaches further than an earlier one."""
    lines = [line.replace("\r", "") for line in lines if len(line) < max_chars]
    content = "\n".join(lines) + "\n" * ends_in_line_end
    (tmp_path / "rows.csv").write_text(HEADER + content)
    with monkeypatch.context() as patch:
        patch.setattr(csv_records, "MAX_LINE_CHARS", max_chars)
        assert rows_of(tmp_path / "rows.csv") == list(expected_rows(content, max_chars))


@pytest.mark.parametrize(
    "content",
    [
        'a","x\n' * 400,
        '"a\n' * 400,
        'a","x\n' * 400 + '"x\n',
        'a","x\n' * 400 + "x" * 900 + '"\n',
        ('a","x\n' * 20 + '"ends",here\n') * 20,
        '"\n' * 400,
    ],
    ids=["open to the end", "opened anew", "an error at the end", "closed by a long line", "blocks", "bare quotes"],
)
@pytest.mark.parametrize("max_chars", [1000, 10**6])
def test_no_line_is_read_more_than_a_few_times(
    content: str, max_chars: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_out = 0
    give = csv_records._Feed.__next__
    test = csv_records._Feed._closed_by

    def counting_give(feed: csv_records._Feed) -> str:
        nonlocal given_out
        given_out += 1
        return give(feed)

    def counting_test(feed: csv_records._Feed, line: Line) -> object:
        nonlocal given_out
        given_out += 1
        return test(feed, line)

    monkeypatch.setattr(csv_records, "MAX_LINE_CHARS", max_chars)
    monkeypatch.setattr(csv_records._Feed, "__next__", counting_give)
    monkeypatch.setattr(csv_records._Feed, "_closed_by", counting_test)
    (tmp_path / "rows.csv").write_text(HEADER + content)
    with (tmp_path / "rows.csv").open(newline="") as stream:
        num_lines = sum(1 for _ in numbered_lines(stream))
    assert rows_of(tmp_path / "rows.csv") == list(expected_rows(content, max_chars))
    assert given_out < 5 * num_lines
