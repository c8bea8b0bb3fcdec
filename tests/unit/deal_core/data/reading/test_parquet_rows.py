"""Rows of a Parquet file that are decoded together stay within bounds, however often the file repeats a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deal_core.data.reading import parquet_rows
from deal_core.data.reading.parquet_rows import decoded_size
from deal_core.data.reading.readers import read_batches, read_rows
from deal_core.errors import DataValidationError

LONG = "é" * 5_000
CHATS = [
    [{"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": LONG[: number * 90]}]
    for number in range(40)
]


def repeated(value: str, num_rows: int) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array([0] * num_rows, pa.int32()), pa.array([value]))


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
    assert [row.raw() for batch in read_batches(tmp_path / "rows.parquet", {"text"}) for row in batch] == rows


def test_rows_that_share_a_long_text_become_objects_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    rows_of = parquet_rows._batch_rows

    def watch(batch: pa.RecordBatch) -> list[dict[str, Any]]:
        decoded.append(decoded_size(batch))
        return rows_of(batch)

    monkeypatch.setattr(parquet_rows, "MAX_LINE_CHARS", 2**18)
    monkeypatch.setattr(parquet_rows, "_batch_rows", watch)
    pq.write_table(pa.table({"text": repeated("x" * 40_000, 200)}), tmp_path / "rows.parquet")
    assert sum(map(len, read_batches(tmp_path / "rows.parquet"))) == 200
    assert sum(decoded) > 200 * 40_000 and max(decoded) <= 2**18


def test_rows_that_share_a_long_text_are_decoded_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A column without any text beside them does not hinder that."""
    monkeypatch.setattr(parquet_rows, "_PIECE_BYTES", 2**18)
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["x" * 40_000] * 200, "none": pa.nulls(200, pa.string())}), path)
    packed = pq.ParquetFile(path, read_dictionary=["text", "none"])
    with parquet_rows.open_parquet(path) as file:
        pieces = list(parquet_rows._pieces(file, packed))
    assert sum(piece.num_rows for piece in pieces) == 200
    assert max(map(decoded_size, pieces)) < 2**18 + 2**10
    assert not any(pa.types.is_dictionary(column.type) for column in pieces[0].columns)


def test_texts_stored_as_differences_are_decoded_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_rows, "_MAX_DELTA_BYTES", 2**15)
    options = {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}}
    pq.write_table(pa.table({"text": [LONG] * 99}), tmp_path / "rows.parquet", **options)
    with parquet_rows.open_parquet(tmp_path / "rows.parquet") as file:
        assert {piece.num_rows for piece in parquet_rows._pieces(file, file)} == {3}
    assert [row.values["text"] for row in read_rows(tmp_path / "rows.parquet")] == [LONG] * 99


def test_a_row_beyond_the_bound_is_one_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_rows, "MAX_LINE_CHARS", 2000)
    texts = ["a" * 100, "b" * 3000, "c" * 100]
    pq.write_table(pa.table({"text": texts, "label": ["x", "y", "z"]}), tmp_path / "rows.parquet")
    first, bad, last = read_rows(tmp_path / "rows.parquet")
    assert [row.values["text"] for row in (first, last)] == [texts[0], texts[2]]
    assert (bad.number, bad.fault and bad.fault.reason, bad.values) == (2, "over-long text", {})
    assert 3000 <= bad.raw()["bytes of text"] < 3100


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
    ("table", "said"),
    [
        ({"text": pa.nulls(300_000, pa.string())}, r"300,000 rows in .* bytes"),
        ({"text": repeated("x" * 2**22, 1000)}, "unpacks to more than 1000 times"),
        ({"l": pa.ListArray.from_arrays([0, 2**25], pa.nulls(2**25, pa.int8()))}, r"33,554,432 values in lists"),
    ],
    ids=["rows", "dictionary", "list"],
)
def test_a_small_file_of_much_is_refused(table: dict[str, Any], said: str, tmp_path: Path) -> None:
    pq.write_table(pa.table(table), tmp_path / "rows.parquet", compression="zstd")
    with pytest.raises(DataValidationError, match=said):
        list(read_batches(tmp_path / "rows.parquet"))


def test_lists_of_texts_stored_as_differences_are_refused(tmp_path: Path) -> None:
    options = {"use_dictionary": False, "column_encoding": {"l.list.element": "DELTA_BYTE_ARRAY"}}
    pq.write_table(pa.table({"l": [["a", "b"]]}), tmp_path / "rows.parquet", **options)
    with pytest.raises(DataValidationError, match="differences"):
        list(read_batches(tmp_path / "rows.parquet"))


@pytest.mark.parametrize("zone", ["Mars/Base", "+99:99"])
def test_a_time_of_an_unknown_zone_is_the_utc_that_the_file_has(zone: str, tmp_path: Path) -> None:
    def times(kind: pa.DataType) -> pa.Table:
        moments = pa.array([1_000_000_000_000_000, None, -(2**62)], pa.int64()).view(kind)
        pairs = pa.StructArray.from_arrays([moments, pa.array([b"a", b"b", b"\xff"]).view(pa.string())], ["at", "who"])
        keys = pa.array(["x", "y", "z"])
        return pa.table(
            {
                "when": moments,
                "pair": pairs,
                "list": pa.ListArray.from_arrays([0, 1, 3, 3], pairs),
                "map": pa.MapArray.from_arrays([0, 1, 2, 3], keys, moments),
            }
        )

    pq.write_table(times(pa.timestamp("us", zone)), tmp_path / "unknown.parquet")
    pq.write_table(times(pa.timestamp("us", "UTC")), tmp_path / "utc.parquet")
    unknown, utc = (
        [dict(row.values) for row in read_rows(tmp_path / f"{name}.parquet")] for name in ("unknown", "utc")
    )
    assert unknown == utc
    assert str(unknown[0]["when"]) == "2001-09-09 01:46:40+00:00" and unknown[1]["when"] is None
    assert unknown[0]["map"] == [("x", unknown[0]["when"])] and unknown[2]["pair"]["who"] == b"\xff"
    assert "[" not in str(unknown[2]["when"]), "a time beyond Python's years is no picture of an array either"


def test_times_of_an_unknown_zone_deep_in_lists_cost_no_row() -> None:
    deep: pa.Array = pa.array([0]).view(pa.timestamp("us", "Mars/Base"))
    for _ in range(2000):
        deep = pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), deep)
    assert parquet_rows._cells(deep) == ["a value that is nested too deeply"]
