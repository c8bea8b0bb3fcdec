"""Parts of a Parquet file have all rows and stay within bounds, however often the file repeats a text."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deal_core.data.reading import parquet_rows
from deal_core.data.reading.parquet_rows import decoded_size, read_parquet, rows_of
from tests.parsed import parsed_rows

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
    assert [row.values for row in parsed_rows(tmp_path / "rows.parquet")] == rows
    part = next(read_parquet(tmp_path / "rows.parquet"))
    assert isinstance(part, pa.RecordBatch)
    some = rows_of(part, 1, {"text"})
    assert [(row.values, row.raw()) for row in some] == [({"text": row["text"]}, row) for row in rows[: len(some)]]


def test_rows_that_share_a_long_text_become_objects_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_rows, "MAX_LINE_CHARS", 2**18)
    pq.write_table(pa.table({"text": repeated("x" * 40_000, 200)}), tmp_path / "rows.parquet")
    parts = list(read_parquet(tmp_path / "rows.parquet"))
    assert sum(map(len, parts)) == 200
    sizes = [decoded_size(part) for part in parts]
    assert sum(sizes) > 200 * 40_000 and max(sizes) <= 2**18


def test_no_text_stays_in_a_dictionary(tmp_path: Path) -> None:
    """A part of the rows would hold all texts of it, wherever in a column it is."""
    texts = pa.DictionaryArray.from_arrays(pa.array([0, 1, 0], pa.int32()), pa.array(["short", LONG]))
    inner = pa.StructArray.from_arrays([texts], ["content"])
    lists = pa.ListArray.from_arrays(pa.array([0, 1, 3], pa.int32()), inner)
    table = pa.table({"plain": texts.slice(0, 2), "lists": lists, "texts": [["a"], ["b"]]})
    pq.write_table(table, tmp_path / "rows.parquet")
    part = next(read_parquet(tmp_path / "rows.parquet"))
    assert isinstance(part, pa.RecordBatch)
    assert part.schema.types[:2] == [pa.string(), pa.list_(pa.struct([("content", pa.string())]))]
    assert decoded_size(part.slice(0, 1)) < 200 < 20_000 < decoded_size(part.slice(1, 1)) < 20_300
    assert part.to_pylist() == table.to_pylist()


def test_nulls_of_a_list_count(tmp_path: Path) -> None:
    """They take no bytes in Arrow, and become objects all the same."""
    lists = pa.ListArray.from_arrays(pa.array([0, 1, 2**20], pa.int32()), pa.nulls(2**20, pa.null()))
    pq.write_table(pa.table({"l": lists}), tmp_path / "rows.parquet")
    first, bad = parsed_rows(tmp_path / "rows.parquet")
    assert first.values == {"l": [None]} and bad.fault is not None and bad.fault.reason == "over-long text"


def test_a_row_beyond_the_bound_is_one_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_rows, "MAX_LINE_CHARS", 2000)
    texts = ["a" * 100, "b" * 3000, "c" * 100]
    pq.write_table(pa.table({"text": texts, "label": ["x", "y", "z"]}), tmp_path / "rows.parquet")
    first, bad, last = parsed_rows(tmp_path / "rows.parquet")
    assert [row.values["text"] for row in (first, last)] == [texts[0], texts[2]]
    assert (bad.number, bad.fault and bad.fault.reason, bad.values) == (2, "over-long text", {})
    assert 3000 <= bad.raw()["bytes of text"] < 3100


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
        [dict(row.values) for row in parsed_rows(tmp_path / f"{name}.parquet")] for name in ("unknown", "utc")
    )
    assert unknown == utc
    assert str(unknown[0]["when"]) == "2001-09-09 01:46:40+00:00" and unknown[1]["when"] is None
    assert unknown[0]["map"] == [("x", unknown[0]["when"])] and unknown[2]["pair"]["who"] == b"\xff"
    assert "[" not in str(unknown[2]["when"]), "a time beyond Python's years is no picture of an array either"
