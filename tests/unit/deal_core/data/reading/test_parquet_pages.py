"""The unpacked size of a Parquet file is known before unpacking, and rows decoded together stay within bounds."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deal_core.data.reading import parquet_pages, parquet_rows
from deal_core.data.reading.parquet_pages import MANY, PageError, look_at_chunk
from deal_core.data.reading.parquet_rows import decoded_size
from deal_core.data.reading.readers import read_batches, read_rows
from deal_core.errors import DataValidationError

LONG = "é" * 5_000
CHATS = [
    [{"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": LONG[: number * 90]}]
    for number in range(40)
]


def write(table: pa.Table, **options: Any) -> tuple[io.BytesIO, pq.ParquetFile]:
    content = io.BytesIO()
    pq.write_table(table, content, **options)
    return content, pq.ParquetFile(content)


def repeated(value: str, num_rows: int) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array([0] * num_rows, pa.int32()), pa.array([value]))


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("codec", ["none", "snappy", "gzip", "brotli", "zstd", "lz4"])
def test_pages_are_as_they_were_written(codec: str, version: str) -> None:
    """Without their headers, the pages' sizes add up to the footer's size of an honest file."""
    texts = ["short", LONG, None] * 4000
    table = pa.table({"text": texts, "plain": [f"{number} {'x' * 40}" for number in range(12_000)]})
    content, file = write(
        table, compression=codec, data_page_version=version, data_page_size=2**14, use_dictionary=["text"]
    )
    text, plain = (file.metadata.row_group(0).column(index) for index in (0, 1))
    pages = look_at_chunk(content, text, 2**20)
    assert pages.num_values == 12_000
    assert pages.longest_repeated == len(LONG.encode())
    assert not pages.has_delta_texts
    pages = look_at_chunk(content, plain, 2**20)
    assert (pages.num_values, pages.longest_repeated) == (12_000, 0)
    assert 0.9 * plain.total_uncompressed_size < pages.unpacked_bytes < plain.total_uncompressed_size
    assert 2**14 <= pages.largest_page < 2**17
    assert 100 < pages.fewest_values < 2000


def test_a_dictionary_that_is_too_large_to_unpack_counts_whole() -> None:
    content, file = write(pa.table({"text": [LONG, "short"] * 9}))
    pages = look_at_chunk(content, file.metadata.row_group(0).column(0), 100)
    assert len(LONG.encode()) < pages.longest_repeated == pages.largest_page
    assert pages.fewest_values == MANY, "one page of data"


def test_texts_written_as_differences_may_be_as_long_as_their_page() -> None:
    content, file = write(
        pa.table({"text": [LONG] * 99}), use_dictionary=False, column_encoding={"text": "DELTA_BYTE_ARRAY"}
    )
    pages = look_at_chunk(content, file.metadata.row_group(0).column(0), 2**20)
    assert pages.has_delta_texts
    assert pages.longest_repeated == pages.largest_page > len(LONG.encode())


def test_a_header_longer_than_what_is_read_at_first_is_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    content, file = write(pa.table({"text": [LONG, "short"] * 9}), write_page_index=False)
    expected = look_at_chunk(content, file.metadata.row_group(0).column(0), 2**20)
    monkeypatch.setattr(parquet_pages, "_HEADER_BYTES", 3)
    assert look_at_chunk(content, file.metadata.row_group(0).column(0), 2**20) == expected


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(4, 400), noise=st.binary(min_size=1, max_size=40))
def test_damage_in_a_header_is_said_or_costs_nothing(place: int, noise: bytes, tmp_path: Path) -> None:
    content, file = write(pa.table({"text": [f"text {number}" for number in range(30)]}))
    damaged = bytearray(content.getvalue())
    damaged[place : place + len(noise)] = noise
    with contextlib.suppress(PageError):
        pages = look_at_chunk(io.BytesIO(bytes(damaged)), file.metadata.row_group(0).column(0), 2**20)
        assert min(pages[:5]) >= 0


@pytest.mark.parametrize("piece_bytes", [1, 2**12, 2**16, 2**26])
def test_rows_are_the_same_however_few_are_decoded_at_a_time(
    piece_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This includes texts of lists that stay in their dictionary."""
    rows = [
        {"id": number, "text": LONG[: number * 40], "messages": chat, "tags": ["x", LONG] if number % 3 else None}
        for number, chat in enumerate(CHATS)
    ]
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=13, data_page_size=2**10, write_batch_size=4)
    monkeypatch.setattr(parquet_rows, "_PIECE_BYTES", piece_bytes)
    assert [row.values for row in read_rows(tmp_path / "rows.parquet")] == rows
    assert [row.raw() for row in read_rows(tmp_path / "rows.parquet", {"text"})] == rows


def test_rows_that_may_be_large_are_decoded_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    size_of = parquet_rows.decoded_size

    def watch(cells: Any) -> int:
        decoded.append(size_of(cells))
        return decoded[-1]

    monkeypatch.setattr(parquet_rows, "_PIECE_BYTES", 2**18)
    monkeypatch.setattr(parquet_rows, "decoded_size", watch)
    table = pa.table({"text": repeated("x" * 40_000, 200)})
    pq.write_table(table, tmp_path / "rows.parquet")
    assert sum(batch.num_rows for batch in read_batches(tmp_path / "rows.parquet")) == 200
    assert max(decoded) < 2**18 + 2**10


def test_a_row_beyond_the_bound_is_one_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_rows, "MAX_LINE_CHARS", 2000)
    texts = ["a" * 100, "b" * 3000, "c" * 100]
    pq.write_table(pa.table({"text": texts, "label": ["x", "y", "z"]}), tmp_path / "rows.parquet")
    first, bad, last = read_rows(tmp_path / "rows.parquet")
    assert [row.values["text"] for row in (first, last)] == [texts[0], texts[2]]
    assert (bad.number, bad.fault and bad.fault.reason, bad.values) == (2, "over-long text", {})
    assert 3000 <= bad.raw()["bytes of text"] < 3100
    (batch,) = read_batches(tmp_path / "rows.parquet")
    assert batch.column("text").to_pylist() == [texts[0], None, texts[2]]


def test_a_text_that_a_list_repeats_is_counted_as_often_and_never_decoded(tmp_path: Path) -> None:
    messages = pa.ListArray.from_arrays([0, 1, 400], repeated("x" * 2**20, 400))
    pq.write_table(pa.table({"messages": messages, "n": [1, 2]}), tmp_path / "rows.parquet", compression="zstd")
    before = pa.total_allocated_bytes()
    with pytest.raises(DataValidationError, match=r"unpacks to more than 1000 times.*without dictionaries"):
        list(read_batches(tmp_path / "rows.parquet"))
    assert pa.total_allocated_bytes() - before < 2**22
    nested = pa.array([[{"a": "xy"}, {"a": "xy"}], []], pa.list_(pa.struct([("a", pa.string())])))
    packed = pa.ListArray.from_arrays(
        nested.offsets, pa.StructArray.from_arrays([nested.values.field(0).dictionary_encode()], ["a"])
    )
    assert decoded_size(packed.slice(1, 1)) < 20 < decoded_size(packed) < 60
    texts = pa.DictionaryArray.from_arrays(pa.array([0, 1], pa.int32()), pa.array(["short", LONG]))
    both = pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), texts)
    assert decoded_size(both.slice(0, 1)) < 30 < 10_000 < decoded_size(both.slice(1, 1)) < 10_100


@pytest.mark.parametrize(
    ("table", "options", "said"),
    [
        ({"text": pa.nulls(300_000, pa.string())}, {}, r"300,000 rows in .* bytes"),
        ({"text": repeated("x" * 2**22, 1000)}, {}, "unpacks to more than 1000 times"),
        ({"text": ["x" * 2**20] * 200}, {"use_dictionary": False}, r"pages of 200 MiB.*smaller pages"),
        ({"l": pa.ListArray.from_arrays([0, 2**25], pa.nulls(2**25, pa.int8()))}, {}, r"33,554,432 values in lists"),
        (
            {"l": [["x" * 2**20] * 300]},
            {"use_dictionary": False, "column_encoding": {"l.list.element": "DELTA_BYTE_ARRAY"}},
            "differences",
        ),
    ],
    ids=["rows", "dictionary", "page", "list", "differences"],
)
def test_a_small_file_of_much_is_refused(
    table: dict[str, Any], options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    pq.write_table(pa.table(table), tmp_path / "rows.parquet", compression="zstd", **options)
    with pytest.raises(DataValidationError, match=said):
        list(read_batches(tmp_path / "rows.parquet"))
