"""Every kind of file gives its raw rows complete and in order, and a bad row does not spoil good rows."""

from __future__ import annotations

import contextlib
import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deal_core.data.reading.readers import count_rows, read_head, read_rows
from deal_core.errors import DataValidationError
from tests.built import write_rows
from tests.hypothesis_settings import SHARED_FIXTURES
from tests.parsed import parsed_rows

ROWS = [
    {"text": 'She said "no",\nthen left', "label": "a"},
    {"text": "naïve café; 東京 🚚", "label": "b"},
    {"text": "plain\u2028separator", "label": "c"},
]


def write(path: Path, content: bytes | str) -> Path:
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def read(path: Path) -> list[dict[str, Any]]:
    rows = list(read_rows(path))
    assert [row.fault for row in rows] == [None] * len(rows)
    return [dict(row.values) for row in rows]


@pytest.mark.parametrize("packing", ["", ".gz"])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "parquet"])
def test_every_kind_gives_its_rows_and_their_number_or_says_that_it_was_cut_off(
    tmp_path: Path, kind: str, packing: str
) -> None:
    path = write_rows(tmp_path / f"rows.{kind}{packing}", ROWS)
    assert read(path) == ROWS and [row.number for row in read_rows(path)] == [1, 2, 3]
    assert read_head(path).columns == ("text", "label") and [*count_rows([path])] == [3]
    if packing or kind == "parquet":  # a gzip file is known by its bytes
        bare = tmp_path / f"bare.{kind}"
        bare.write_bytes(path.read_bytes())
        assert read(bare) == ROWS
        write_rows(path, [{"text": f"row {index} {index**7}", "label": "a"} for index in range(3000)])
        path.write_bytes(path.read_bytes()[:-200])
        with pytest.raises(DataValidationError, match=r"^rows\..*cut off.*upload it again"):
            list(read_rows(path))
        assert [*count_rows([path])] == [None]


def test_a_gzip_file_of_several_members_is_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(b"".join(gzip.compress(json.dumps(row).encode() + b"\n") for row in ROWS))
    assert read(path) == ROWS


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\x00"), max_size=30)


@settings(SHARED_FIXTURES, max_examples=60)
@given(rows=st.lists(st.fixed_dictionaries({"text": TEXTS, "label": TEXTS}), min_size=1, max_size=8))
@example(rows=[{"text": "", "label": " "}])
@example(rows=[{"text": "    return 1", "label": "\t\tpass"}])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_any_text_comes_back_as_it_was_written(tmp_path: Path, kind: str, rows: list[dict[str, str]]) -> None:
    found = list(parsed_rows(write_rows(tmp_path / f"rows.{kind}", rows)))
    assert [(row.values, row.fault) for row in found] == [(row, None) for row in rows]


@settings(SHARED_FIXTURES, max_examples=150)
@given(content=st.binary(max_size=200) | st.text('a,"\n\r;', max_size=60).map(str.encode))
def test_no_bytes_at_all_make_a_text_reader_fail_otherwise_than_by_a_message(tmp_path: Path, content: bytes) -> None:
    for name in ("rows.csv", "rows.jsonl"):
        path = write(tmp_path / name, content)
        with contextlib.suppress(DataValidationError):
            for row in parsed_rows(path):
                assert row.fault is not None or row.values or b"{" in content, "an empty object has no cells"


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        ('text{0}label\n"a, b; c\td"{0}x\n', {2: ("a, b; c\td", "x")}),
        ("text{0}label\n  def f():{0}    return 1\n", {2: ("  def f():", "    return 1")}),
        ('text{0} label\n"one, two"{0} "a"\nthree{0} b\n', {2: ("one, two", "a"), 3: ("three", "b")}),
        ('\ufefftext{0}label\n"two\nlines"{0}a\n\nplain{0}b\n\n', {2: ("two\nlines", "a"), 5: ("plain", "b")}),
        ("text{0}label\r\n\r\none{0}a\r\n\r\n", {3: ("one", "a")}),
        ("sep={0}\ntext{0}label\na|b{0}x\n", {3: ("a|b", "x")}),
        ('\ufeff"SEP={0}"\r\ntext{0}label\r\na{0}x\r\n', {3: ("a", "x")}),
    ],
)
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_csv_is_read_as_spreadsheets_write_it(
    tmp_path: Path, content: str, rows: dict[int, tuple[str, str]], delimiter: str
) -> None:
    path = write(tmp_path / "rows.csv", content.format(delimiter))
    assert read_head(path).columns == ("text", "label")
    found = list(parsed_rows(path))
    assert {row.line: tuple(row.values.values()) for row in found} == rows
    assert [row.number for row in found] == [*range(1, len(rows) + 1)]


def test_a_separator_wins_and_one_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", "sep=;\ntext, or;label\na, b;x\n")
    assert read_head(path).columns == ("text, or", "label") and read(path) == [{"text, or": "a, b", "label": "x"}]
    with pytest.raises(DataValidationError) as refused:
        list(read_rows(write(tmp_path / "rows.csv", "sep=|\ntext|label\na|x\n")))
    assert refused.value.code == "csv-separator"


def test_a_doubled_csv_column_is_named_twice_and_loses_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", "text,label,text\n1,2,3\n")
    assert read_head(path).columns == ("text", "label", "text")
    assert list(read(path)[0].values()) == ["1", "2", "3"]


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_json_lines_may_have_a_mark_blank_lines_and_windows_line_ends(tmp_path: Path, line_end: str) -> None:
    lines = ['\ufeff{"text": "a"}', "broken", "", '{"label": "b", "id": 1}', ""]
    path = write(tmp_path / "rows.jsonl", line_end.join(lines))
    first, bad, last = parsed_rows(path)
    assert (first.values, last.values, last.number) == ({"text": "a"}, {"label": "b", "id": 1}, 4)
    assert bad.fault is not None and bad.raw() == "broken"
    assert read_head(path).columns == ("text", "label", "id"), "of all the first rows"


def test_text_that_is_not_utf8_survives_to_the_row_check(tmp_path: Path) -> None:
    for name, content in (("rows.csv", b"text,label\ncaf\xe9,a\n"), ("rows.jsonl", b'{"text": "caf\xe9"}\n')):
        path = tmp_path / name
        path.write_bytes(content)
        assert read(path)[0]["text"].encode("utf-8", "surrogateescape") == b"caf\xe9"
    text = pa.array([b"caf\xe9", b"fine"], pa.binary()).view(pa.string())
    nested = pa.array([[b"caf\xe9"], [b"fine"]], pa.list_(pa.binary())).view(pa.list_(pa.string()))
    pq.write_table(pa.table({"text": text, "nested": nested, "label": ["a", "b"]}), tmp_path / "rows.parquet")
    first, last = read(tmp_path / "rows.parquet")
    assert (first["text"], last) == (b"caf\xe9", {"text": "fine", "nested": ["fine"], "label": "b"})


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("mark", ["\ufeff", ""], ids=["mark", "bare"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_a_file_of_wide_characters_is_refused_by_the_name_of_its_encoding(
    tmp_path: Path, encoding: str, mark: str, kind: str
) -> None:
    content = write_rows(tmp_path / f"rows.{kind}", ROWS).read_text(encoding="utf-8")
    path = write(tmp_path / f"rows.{kind}", f"{mark}{content}".encode(encoding))
    for use in (read_head, read):
        with pytest.raises(DataValidationError, match=encoding[:6].upper()) as refused:
            use(path)
        assert refused.value.code == "encoding"
    assert [*count_rows([path])] == [None]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_an_endless_line_is_one_bad_row_and_never_in_memory(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("lines", "csv_records", "json_rows"):
        monkeypatch.setattr(f"deal_core.data.reading.{module}.MAX_LINE_CHARS", 2**16)
    rows = [{"text": text, "label": "a"} for text in ("first", "x" * 2**23, "last")]
    path = write_rows(tmp_path / f"rows.{kind}.gz", rows)
    del rows
    tracemalloc.start()
    found = [(row.number, row.fault and row.fault.reason, row.values.get("text")) for row in parsed_rows(path)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == [(1, None, "first"), (2, "over-long text", None), (3, None, "last")]
    assert peak < 2**21


def test_a_small_file_of_many_rows_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.nulls(300_000, pa.string())}), tmp_path / "rows.parquet", compression="zstd")
    write(tmp_path / "rows.jsonl.gz", b"{}\n" * 300_000)
    for name in ("rows.parquet", "rows.jsonl.gz"):
        with pytest.raises(DataValidationError, match=r"more than 100,000 rows"):
            list(parsed_rows(tmp_path / name))


@pytest.mark.parametrize("name", ["rows.csv", "rows.csv.gz", "rows.jsonl", "rows.parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, name: str) -> None:
    """Peak memory over a file of 2 MB and over one four times as long."""
    peaks = []
    for num_rows in (2_000, 8_000):
        rows = ({"text": f"{index} " + "word " * 200, "label": "a"} for index in range(num_rows))
        path = write_rows(tmp_path / name, rows)
        tracemalloc.start()
        arrow_before, arrow_peak = pa.total_allocated_bytes(), 0
        for row in parsed_rows(path):
            if row.number % 256 == 1:
                arrow_peak = max(arrow_peak, pa.total_allocated_bytes() - arrow_before)
        peaks.append(tracemalloc.get_traced_memory()[1] + arrow_peak)
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0] + 2**16
    assert peaks[1] < 7 * 2**20


@pytest.mark.parametrize("name", [b"\xff\xfezz", b"\xed\xa0\x80z", b"zzz\xe2"])
@pytest.mark.parametrize("is_nested", [False, True])
def test_a_column_whose_name_is_broken_is_said(name: bytes, is_nested: bool, tmp_path: Path) -> None:
    others: list[Any] = [{"zzzz": 1}] if is_nested else [1]
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["a"], "other" if is_nested else "zzzz": others}), path, store_schema=False)
    path.write_bytes(path.read_bytes().replace(b"zzzz", name))
    for use in (read_head, read):
        with pytest.raises(DataValidationError, match=r"rows\.parquet has a column whose name is not UTF-8"):
            use(path)
