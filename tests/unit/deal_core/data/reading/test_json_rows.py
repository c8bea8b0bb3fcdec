"""A file that is one JSON list gives the rows that JSON lines give, and is never in memory as a whole."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deal_core.data.reading import json_rows, lines
from deal_core.data.reading.parsing import head
from deal_core.errors import DataValidationError
from tests.built import write_rows
from tests.hypothesis_settings import SHARED_FIXTURES
from tests.parsed import parsed_rows

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
ROWS = st.lists(st.dictionaries(st.text(max_size=3), VALUES, max_size=3), min_size=1, max_size=5)


def write(path: Path, content: str) -> Path:
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    return path


@pytest.mark.parametrize("piece", [1, 2, 7, 2**18])
@pytest.mark.parametrize("indent", [None, 1])
@settings(SHARED_FIXTURES, max_examples=25)
@given(content=ROWS)
@example(content=[{"text": f'no. {number}, "[{{', "label": [number, {"a": None}]} for number in range(50)])
def test_a_list_has_the_rows_of_json_lines_in_pieces_of_any_size(
    piece: int, indent: int | None, content: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_rows, "_PIECE_CHARS", piece)
    path = write(tmp_path / "rows.json", json.dumps(content, indent=indent, ensure_ascii=False))
    found = list(parsed_rows(path))
    assert [(row.number, row.values) for row in found] == [*enumerate(content, start=1)]
    lines = path.read_bytes().decode().split("\n")
    assert all(lines[row.line - 1].lstrip(" [").startswith("{") for row in found if row.line)
    assert {*head(path, "jsonl").columns} == {name for row in content for name in row}


@pytest.mark.parametrize("content", ["[]", " [ ]\n\n", "[\n]\n"])
def test_an_empty_list_has_no_rows(tmp_path: Path, content: str) -> None:
    path = write(tmp_path / "rows.json", content)
    assert (list(parsed_rows(path)), head(path, "jsonl").columns) == ([], ())


@pytest.mark.parametrize("first", ["[]", "{"])
def test_a_bracket_alone_among_json_lines_is_one_bad_row(tmp_path: Path, first: str) -> None:
    bad, good = parsed_rows(write(tmp_path / "rows.jsonl", f'{first}\n{{"text": "a"}}\n'))
    assert bad.fault is not None and good.values == {"text": "a"}


@pytest.mark.parametrize("content", [{"data": [{"text": "a"}]}, {"text": "a"}])
def test_an_object_over_several_lines_is_refused_with_what_to_write(tmp_path: Path, content: Any) -> None:
    path = write(tmp_path / "rows.json", json.dumps(content, indent=2))
    for read in (lambda path: head(path, "jsonl"), lambda path: list(parsed_rows(path))):
        with pytest.raises(DataValidationError, match=r"rows\.json begins with one JSON object"):
            read(path)


@pytest.mark.parametrize(
    ("item", "why"),
    [
        ("1234567", "not an object of columns"),
        ('["text"]', "not an object of columns"),
        ('{"text": "Jane", "text": "Doe"}', "a key occurs twice"),
        ('{"inner": {"Jane": 1, "Jane": 2}, "text": "later"}', "a key occurs twice"),
        ('{"text": ' + "9" * 5000 + "}", "a number has too many digits"),
        ('{"text": ' + "[" * 101 + "]" * 101 + "}", "nested too deeply"),
    ],
)
@pytest.mark.parametrize("piece", [3, 2**18])
def test_a_bad_item_is_one_bad_row(
    tmp_path: Path, item: str, why: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_rows, "_PIECE_CHARS", piece)
    first, bad, last = parsed_rows(write(tmp_path / "rows.json", f'[{{"text": "a"}},\n{item},\n{{"text": "b"}}]'))
    assert (first.values, last.values) == ({"text": "a"}, {"text": "b"})
    assert bad.fault is not None and (bad.fault.reason, bad.fault.why) == ("malformed line", why)
    assert (bad.number, bad.line, bad.raw()) == (2, 2, item)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ('[{"a": 1},\n {"b": 2}', "line 2: "),
        ('[{"a": 1},\n {"b": ', "line 2: "),
        ('[{"a": 1},\n {"b": Jane}]', "line 2: Expecting value"),
        ('[{"a": 1}\n {"b": 2}]', "line 2: , is missing, and other text"),
        ('[{"a": 1}] {"b": 2}', "text follows the end"),
        ('[{"a": 1},]', "Expecting value"),
        (json.dumps([{"text": "a"}, {"text": "x" * 5000}]), "item 2 is not JSON, or has more than 1000 characters"),
    ],
)
def test_a_list_that_is_not_json_is_refused_with_its_line(
    tmp_path: Path, content: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_rows, "MAX_LINE_CHARS", 1000)
    monkeypatch.setattr(json_rows, "_PIECE_CHARS", 100)
    with pytest.raises(DataValidationError, match=rf"rows.json is a JSON list that cannot be read .*{found}") as error:
        list(parsed_rows(write(tmp_path / "rows.json", content)))
    assert "Jane" not in str(error.value)


def test_memory_does_not_grow_with_the_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of any length takes as much as its first line may have, to see that it is a list, and then its pieces.

    Both are made small here. With the real ones the peak is 17.0 MB, from a list of 16 MB to one of 64 MB.
    """
    for module in (json_rows, lines):
        monkeypatch.setattr(module, "MAX_LINE_CHARS", 2**17)
    monkeypatch.setattr(json_rows, "_PIECE_CHARS", 2**14)

    def peak_of(num_rows: int) -> int:
        rows = ({"text": str(number), "more": "x" * 500} for number in range(num_rows))
        path = write_rows(tmp_path / f"{num_rows}.json.gz", rows)
        tracemalloc.start()
        count = sum(1 for _ in parsed_rows(path))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count == num_rows
        return peak

    peak_of(1)  # what is imported and compiled once
    assert peak_of(16_000) < 1.1 * peak_of(4_000), "of 8 MB and of 2 MB"
