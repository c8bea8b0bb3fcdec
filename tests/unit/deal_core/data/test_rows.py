"""Rows are grouped into batches, and the digest of a row does not depend on how its text is written."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from deal_core.data.reading.parsing import batches_of
from deal_core.data.rows import RawRow, row_digest, row_digests, stored_input_digest


def row(number: int) -> RawRow:
    return RawRow(number, {})


def test_where_reading_fails_the_rows_before_are_a_batch() -> None:
    def rows() -> Iterator[tuple[RawRow, int]]:
        yield row(1), 1
        raise EOFError

    batches = batches_of(rows())
    assert next(batches) == [row(1)]
    with pytest.raises(EOFError):
        next(batches)


def test_a_batch_ends_at_its_number_of_rows_or_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deal_core.data.reading.parsing.BATCH_CHARS", 10)
    monkeypatch.setattr("deal_core.data.reading.parsing.BATCH_ROWS", 3)
    sizes = [1, 1, 1, 1, 6, 6, 4, 1, 11, 99, 2]
    batches = [[each.number for each in batch] for batch in batches_of((row(size), size) for size in sizes)]
    assert batches == [[1, 1, 1], [1, 6], [6, 4], [1], [11], [99], [2]]


@pytest.mark.parametrize("text", ["Caf\u00e9 au lait", " Cafe\u0301  au\tlait\n", "Caf\u00e9\u00a0au\u3000lait"])
def test_unicode_form_and_white_space_do_not_change_the_digest(text: str) -> None:
    digest, input_digest = row_digests([text], ["yes"])
    assert digest == row_digest("Caf\u00e9 au lait", "yes")
    assert input_digest == row_digest("Caf\u00e9 au lait") == stored_input_digest("labelled", text)
