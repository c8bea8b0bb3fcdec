"""Every kind of file gives its raw rows complete and in order, and a bad row does not spoil good rows."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deal_core.data.reading.readers import count_rows, look_at, read_rows
from deal_core.errors import DataValidationError
from tests.hypothesis_settings import SHARED_FIXTURES
from tests.parsed import parsed_rows

ROWS = [
    {"text": 'She said "no",\nthen left', "label": "a"},
    {"text": "naïve café; 東京 🚚", "label": "b"},
    {"text": "plain\u2028separator", "label": "c"},
]


def to_bytes(kind: str, rows: list[dict[str, Any]]) -> bytes:
    if kind == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if kind == "csv":
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def write(path: Path, content: bytes | str) -> Path:
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def read(path: Path) -> list[dict[str, Any]]:
    rows = list(read_rows(path))
    assert [row.fault for row in rows] == [None] * len(rows)
    return [dict(row.values) for row in rows]


def parsed(path: Path) -> list[dict[str, Any]]:
    rows = list(parsed_rows(path))
    assert [row.fault for row in rows] == [None] * len(rows)
    return [dict(row.values) for row in rows]


@pytest.mark.parametrize("packing", ["", ".gz"])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_every_kind_gives_the_rows_back(tmp_path: Path, kind: str, packing: str) -> None:
    path = write(tmp_path / f"rows.{kind}{packing}", to_bytes(kind, ROWS))
    assert read(path) == ROWS
    assert look_at(path).columns == ("text", "label")
    assert [row.number for row in read_rows(path)] == [1, 2, 3]


@pytest.mark.parametrize("packing", ["", ".gz"])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_the_rows_of_every_kind_can_be_counted(tmp_path: Path, kind: str, packing: str) -> None:
    content = to_bytes(kind, ROWS)
    path = tmp_path / f"rows.{kind}{packing}"
    path.write_bytes(gzip.compress(content) if packing else content)
    assert [*count_rows([path])] == [len(ROWS)]
    path.write_bytes(path.read_bytes()[:-12] if packing or kind == "parquet" else b"\xff\xfe")
    assert [*count_rows([path])] == [None]


def test_a_gzip_file_is_known_by_its_bytes_not_its_name(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(gzip.compress(to_bytes("csv", ROWS)))
    assert read(path) == ROWS


def test_a_gzip_file_of_several_members_is_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(b"".join(gzip.compress(to_bytes("jsonl", [row])) for row in ROWS))
    assert read(path) == ROWS


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_a_byte_order_mark_blank_lines_and_windows_line_ends_change_nothing(
    tmp_path: Path, kind: str, line_end: str
) -> None:
    rows = [{"text": "one", "label": "a"}, {"text": "two", "label": "b"}]
    content = to_bytes(kind, rows).replace(b"\r\n", b"\n").replace(b"\n", (line_end * 2).encode())
    path = write(tmp_path / f"rows.{kind}", b"\xef\xbb\xbf" + content + line_end.encode())
    assert parsed(path) == rows
    assert look_at(path).columns == ("text", "label")


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_csv_may_use_semicolons_or_tabs(tmp_path: Path, delimiter: str) -> None:
    path = write(tmp_path / "rows.csv", f'text{delimiter}label\n"a, b; c\td"{delimiter}x\n')
    assert parsed(path) == [{"text": "a, b; c\td", "label": "x"}]


def test_a_blank_after_the_delimiter_does_not_make_quotes_part_of_a_value(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", 'text, label\n"one, two", "a"\nthree, b\n')
    assert read(path) == [{"text": "one, two", "label": "a"}, {"text": "three", "label": "b"}]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_cell_keeps_its_indentation_if_the_header_has_no_blank_after_a_delimiter(
    tmp_path: Path, delimiter: str
) -> None:
    path = write(tmp_path / "rows.csv", f"prompt{delimiter}completion\n  def f():{delimiter}    return 1\n")
    assert parsed(path) == [{"prompt": "  def f():", "completion": "    return 1"}]


def test_a_csv_row_knows_its_row_and_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", 'text,label\n"two\nlines",a\n\nplain,b\n')
    assert [(row.number, row.line) for row in read_rows(path)] == [(1, 2), (2, 5)]


def test_a_doubled_csv_column_is_named_twice_and_loses_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", "text,label,text\n1,2,3\n")
    assert look_at(path).columns == ("text", "label", "text")
    assert list(read(path)[0].values()) == ["1", "2", "3"]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_bytes_that_are_not_utf8_survive_to_the_row_check(tmp_path: Path, kind: str) -> None:
    content = to_bytes(kind, [{"text": "caf@", "label": "a"}, {"text": "fine", "label": "b"}]).replace(b"@", b"\xe9")
    rows = read(write(tmp_path / f"rows.{kind}", content))
    assert rows[0]["text"].encode("utf-8", "surrogateescape") == b"caf\xe9"
    assert rows[1]["text"] == "fine"


def test_parquet_text_that_is_not_utf8_keeps_its_bytes(tmp_path: Path) -> None:
    text = pa.array([b"caf\xe9", b"fine"], pa.binary()).view(pa.string())
    nested = pa.array([[b"caf\xe9"], [b"fine"]], pa.list_(pa.binary())).view(pa.list_(pa.string()))
    pq.write_table(pa.table({"text": text, "nested": nested, "label": ["a", "b"]}), tmp_path / "rows.parquet")
    rows = read(tmp_path / "rows.parquet")
    assert [row["text"] for row in rows] == [b"caf\xe9", "fine"]
    assert [row["label"] for row in rows] == ["a", "b"]
    assert rows[1]["nested"] == ["fine"]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("mark", [True, False], ids=["mark", "bare"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_a_file_of_wide_characters_is_refused_by_the_name_of_its_encoding(
    tmp_path: Path, encoding: str, mark: bool, kind: str
) -> None:
    text = "\ufeff" * mark + to_bytes(kind, ROWS).decode()
    path = write(tmp_path / f"rows.{kind}", text.encode(encoding))
    for read_file in (look_at, lambda path: list(read_rows(path))):
        with pytest.raises(DataValidationError, match=encoding[:6].upper()) as refused:
            read_file(path)
        assert refused.value.code == "encoding"


@pytest.mark.parametrize("line", ["sep=;", "SEP=;\r", '"sep=;"', "\ufeffsep=;"])
def test_a_first_line_with_the_separator_is_understood(tmp_path: Path, line: str) -> None:
    path = write(tmp_path / "rows.csv", f"{line}\ntext, or;label\na, b;x\nc;y\n".encode())
    assert look_at(path).columns == ("text, or", "label")
    assert [(row.line, dict(row.values)) for row in read_rows(path)] == [
        (3, {"text, or": "a, b", "label": "x"}),
        (4, {"text, or": "c", "label": "y"}),
    ]


def test_a_separator_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", b"sep=|\ntext|label\na|x\n")
    with pytest.raises(DataValidationError, match=r"sep=\|") as refused:
        list(read_rows(path))
    assert refused.value.code == "csv-separator"


@pytest.mark.parametrize("name", ["rows.csv.gz", "rows.jsonl.gz", "rows.parquet", "rows.parquet.gz"])
def test_a_file_that_was_cut_off_is_an_error(tmp_path: Path, name: str) -> None:
    rows = [{"text": f"row {index} {index**7}", "label": "a"} for index in range(3000)]
    path = write(tmp_path / name, to_bytes(name.split(".")[1], rows))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataValidationError, match=r"rows\..*cut off.*upload it again"):
        list(read_rows(path))


def test_json_columns_are_those_of_all_the_first_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", '{"text": "a"}\nbroken\n{"label": "b", "id": 1}\n')
    assert look_at(path).columns == ("text", "label", "id")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_an_endless_line_is_one_bad_row_and_never_in_memory(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("lines", "csv_records", "json_rows"):
        monkeypatch.setattr(f"deal_core.data.reading.{module}.MAX_LINE_CHARS", 2**16)
    first, bad, last = ({"text": text, "label": "a"} for text in ("first", "x" * 2**23, "last"))
    path = write(tmp_path / f"rows.{kind}.gz", to_bytes(kind, [first, bad, last]))
    del bad
    tracemalloc.start()
    rows = [(row.number, row.fault and row.fault.reason, row.values.get("text")) for row in parsed_rows(path)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows == [(1, None, "first"), (2, "over-long text", None), (3, None, "last")]
    assert peak < 2**21


def test_a_small_file_of_many_rows_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.nulls(300_000, pa.string())}), tmp_path / "rows.parquet", compression="zstd")
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(b"{}\n" * 300_000))
    for name in ("rows.parquet", "rows.jsonl.gz"):
        with pytest.raises(DataValidationError, match=r"has more than 100,000 rows in .* bytes"):
            list(parsed_rows(tmp_path / name))


@pytest.mark.parametrize("name", ["rows.csv", "rows.csv.gz", "rows.jsonl", "rows.parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, name: str) -> None:
    """Peak memory over a file of 2 MB and over one four times as long."""
    peaks = []
    for num_rows in (2_000, 8_000):
        rows = [{"text": f"{index} " + "word " * 200, "label": "a"} for index in range(num_rows)]
        path = write(tmp_path / name, to_bytes(name.split(".")[1], rows))
        del rows
        tracemalloc.start()
        arrow_before = pa.total_allocated_bytes()
        arrow_peak = 0
        for row in parsed_rows(path):
            if row.number % 256 == 1:
                arrow_peak = max(arrow_peak, pa.total_allocated_bytes() - arrow_before)
        peaks.append(tracemalloc.get_traced_memory()[1] + arrow_peak)
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0] + 2**16
    assert peaks[1] < 7 * 2**20


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\x00"), max_size=30)


@settings(SHARED_FIXTURES, max_examples=60)
@given(rows=st.lists(st.fixed_dictionaries({"text": TEXTS, "label": TEXTS}), min_size=1, max_size=8))
@example(rows=[{"text": "", "label": " "}])
@example(rows=[{"text": "    return 1", "label": "\t\tpass"}])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_any_text_comes_back_as_it_was_written(tmp_path: Path, kind: str, rows: list[dict[str, str]]) -> None:
    path = write(tmp_path / f"rows.{kind}", to_bytes(kind, rows))
    assert parsed(path) == rows


@settings(SHARED_FIXTURES, max_examples=150)
@given(content=st.binary(max_size=200) | st.text('a,"\n\r;', max_size=60).map(str.encode))
def test_no_bytes_at_all_make_a_text_reader_fail_otherwise_than_by_a_message(tmp_path: Path, content: bytes) -> None:
    for name in ("rows.csv", "rows.jsonl"):
        path = tmp_path / name
        path.write_bytes(content)
        with contextlib.suppress(DataValidationError):
            for row in parsed_rows(path):
                assert row.fault is not None or row.values or b"{" in content, "an empty object has no cells"


@pytest.mark.parametrize("name", [b"\xff\xfezz", b"\xed\xa0\x80z", b"zzz\xe2"])
@pytest.mark.parametrize("is_nested", [False, True])
def test_a_column_whose_name_is_broken_is_said(name: bytes, is_nested: bool, tmp_path: Path) -> None:
    others: list[Any] = [{"zzzz": 1}] if is_nested else [1]
    content = io.BytesIO()
    pq.write_table(pa.table({"text": ["a"], "other" if is_nested else "zzzz": others}), content, store_schema=False)
    path = write(tmp_path / "rows.parquet", content.getvalue().replace(b"zzzz", name))
    for use in (look_at, read):
        with pytest.raises(DataValidationError, match=r"rows\.parquet has a column whose name is not UTF-8 \(.*rename"):
            use(path)
