"""Rows are grouped into batches of a bounded size, and are picked from them."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pytest

from deal_core.data.arrow_rows import digests_in, hex_texts
from deal_core.data.reading.batches import ParquetRows
from deal_core.data.reading.parsing import batches_of
from deal_core.data.rows import RawRow


def test_a_batch_ends_at_its_number_of_rows_or_characters_or_where_reading_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("deal_core.data.reading.parsing.BATCH_CHARS", 10)
    monkeypatch.setattr("deal_core.data.reading.parsing.BATCH_ROWS", 3)

    def rows() -> Iterator[tuple[RawRow, int]]:
        yield from ((RawRow(size, {}), size) for size in (1, 1, 1, 1, 6, 6, 4, 1, 11, 99, 2))
        raise EOFError

    found = []
    with pytest.raises(EOFError):
        found.extend([row.number for row in batch] for batch in batches_of(rows()))
    assert found == [[1, 1, 1], [1, 6], [6, 4], [1], [11], [99], [2]]


def test_rows_of_a_batch_are_picked_whatever_their_types() -> None:
    """Few rows of a batch and many; Arrow's own take has no kernel for the one column."""
    columns = {"view": pa.array(["x", "y"] * 200, pa.string_view()), "list": [[number] for number in range(400)]}
    batch = ParquetRows(pa.RecordBatch.from_pydict(columns), 7, ["list"])
    for places in ([], [3, 300], [*range(0, 400, 2)], [*range(400)]):
        rows = batch.rows(places)
        assert [row.number for row in rows] == [place + 7 for place in places]
        assert [row.values for row in rows] == [{"list": [place]} for place in places]
        assert [row.raw() for row in rows] == [{"view": "xy"[place % 2], "list": [place]} for place in places]


def test_digests_are_written_as_python_writes_them() -> None:
    column = pa.array([bytes(range(start, start + 32)) for start in (0, 32, 64)], pa.binary(32))
    batch = pa.RecordBatch.from_arrays([column], names=["digest"]).slice(1)
    assert hex_texts(digests_in(batch, "digest")).to_pylist() == [digest.hex() for digest in column.to_pylist()[1:]]
    assert hex_texts(digests_in(batch.slice(2), "digest")).to_pylist() == []
