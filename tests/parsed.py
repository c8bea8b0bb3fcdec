"""The rows of a file, parsed in this process: what a test changes of the parsers counts, and its memory is seen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from deal_core.data.reading.parquet_rows import rows_of
from deal_core.data.reading.parsing import parse
from deal_core.data.reading.readers import file_kind
from deal_core.data.rows import RawRow


def parsed_rows(path: Path) -> Iterator[RawRow]:
    number = 1
    for part in parse(path, file_kind(path)):
        yield from part if isinstance(part, list) else rows_of(part, number, None)
        number += len(part)
