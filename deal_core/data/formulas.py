"""Texts in CSV files that people open in a spreadsheet: no cell runs as a formula, and each is read back as it was.

A guarded cell has an apostrophe before it, as OWASP advises against CSV injection. Its row says so in a column of its
own, so an apostrophe in any other file stays a part of its text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

GUARD_COLUMN = "deal_guarded"
"""The column that says whether cells of the row are guarded. It is written only if any row has guarded cells."""
_LIKE_FORMULA = re.compile("'*[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")
"""The beginnings that spreadsheets take for formulas, also in full width. Cells that begin like guarded ones are
guarded too: otherwise a text with an apostrophe of its own would lose it."""


def guarded(rows: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Put an apostrophe before each cell that a spreadsheet would run, and mark these rows."""
    safe = [{name: f"'{cell}" if _LIKE_FORMULA.match(cell) else cell for name, cell in row.items()} for row in rows]
    if safe == list(rows):
        return safe
    return [{**row, GUARD_COLUMN: str(row != before).lower()} for row, before in zip(safe, rows, strict=True)]


def unguarded(row: dict[str, str]) -> dict[str, str]:
    """Take the apostrophes of `guarded` off a row, and the mark. A row without the mark stays as it is.

    A cell without its apostrophe stays as it is too: some spreadsheets drop it when they save the file.
    """
    mark = row.get(GUARD_COLUMN)
    if mark is None:
        return row
    is_guarded = mark.strip().casefold() == "true"  # a spreadsheet writes TRUE
    return {
        name: cell[1:] if is_guarded and cell.startswith("'") and _LIKE_FORMULA.match(cell) else cell
        for name, cell in row.items()
        if name != GUARD_COLUMN
    }
