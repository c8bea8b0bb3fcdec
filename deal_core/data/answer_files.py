"""A file of rows with their answers. It appears in one step when all rows are written."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from deal_core.data.reading.readers import file_kind, read_head, read_rows
from deal_core.data.rows import json_text
from deal_core.errors import ConfigError, DataValidationError
from deal_core.regular_file import complete_file

OutputKind = Literal["jsonl", "parquet"]
Rows = Sequence[Mapping[str, Any]]
WriteRows = Callable[[Rows, Rows], None]
"""Takes rows, and the added values of each by the names of OWN_COLUMNS."""
OWN_COLUMNS = ("answer", "problem", "task", "lineage", "version")
"""Columns that are added to a row; a name that the file already uses becomes deal_<name>."""
_INT64 = 2**63
_EXACT_FLOAT = 2**53


class Survey(NamedTuple):
    """Number of rows and columns of a file of rows."""

    num_rows: int
    types: dict[str, pa.DataType]
    """Columns in order, with their types in a Parquet file."""


def survey_rows(path: Path) -> Survey:
    """Read a file once to its end and find its columns with the types of their values.

    A column of a CSV is text. A column of JSON lines keeps its type if one type holds all its values; otherwise it is
    text, and values of other types are written as JSON.

    Raises:
        DataValidationError: The file cannot be read to its end, has no rows, or has two columns of one name.
    """
    if file_kind(path) == "parquet":
        head = read_head(path)
        assert head.schema is not None and head.num_rows is not None, "a Parquet file says both"
        fields = list(head.schema)
        if len({field.name for field in fields}) < len(fields):
            raise DataValidationError(f"{path.name} has two columns of the same name; rename one of them.")
        survey = Survey(head.num_rows, {field.name: field.type for field in fields})
    else:
        kinds: dict[str, set[str]] = {}
        num_rows = 0
        for raw in read_rows(path):
            num_rows += 1
            for name, value in raw.values.items():
                kinds.setdefault(name, set()).add(_kind_of(value))
        survey = Survey(num_rows, {name: _type_for(kinds_of) for name, kinds_of in kinds.items()})
    if not survey.num_rows:
        raise DataValidationError(f"{path.name} has no rows; give a file with rows.")
    return survey


def own_names(columns: Iterable[str]) -> dict[str, str]:
    """Name of each of OWN_COLUMNS in a file that has these columns.

    Raises:
        DataValidationError: The file uses both the name and its deal_ form.
    """
    taken = set(columns)
    names = {name: f"deal_{name}" if name in taken else name for name in OWN_COLUMNS}
    if doubled := taken & set(names.values()):
        raise DataValidationError(f"The file already has the columns {', '.join(sorted(doubled))}; rename them.")
    return names


def output_kind(path: Path) -> OutputKind:
    """The kind of a file of answers, from its name.

    Raises:
        ConfigError: The name ends in neither .jsonl nor .parquet.
    """
    kinds: dict[str, OutputKind] = {".jsonl": "jsonl", ".parquet": "parquet"}
    if path.suffix not in kinds:
        raise ConfigError(f"The answers would go to {path.name}; give a name that ends in .jsonl or .parquet.")
    return kinds[path.suffix]


@contextmanager
def writing_answers(output: Path, types: Mapping[str, pa.DataType], names: Mapping[str, str]) -> Iterator[WriteRows]:
    """Yield a function that writes rows into the new file `output`. It appears after the block; after an error, never.

    Args:
        output: The file.
        types: Columns of the rows, see `Survey.types`.
        names: Names of the added columns, see `own_names`.

    Raises:
        ConfigError: The file exists already, or its name ends in neither .jsonl nor .parquet.
    """
    kind = output_kind(output)
    if output.exists():
        raise ConfigError(f"{output} exists already; delete it, or give another --out.")

    def whole(rows: Rows, own: Rows) -> list[dict[str, Any]]:
        added = [{names[name]: values.get(name) for name in OWN_COLUMNS} for values in own]
        return [{**row, **more} for row, more in zip(rows, added, strict=True)]

    with complete_file(output) as part:
        if kind == "jsonl":
            # a lone surrogate becomes its JSON escape
            with part.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
                yield lambda rows, own: file.writelines(
                    json.dumps(_plain(row), ensure_ascii=False, default=json_text, allow_nan=False) + "\n"
                    for row in whole(rows, own)
                )
        else:
            columns = {**types, **dict.fromkeys(names.values(), pa.string())}
            with pq.ParquetWriter(part, schema := pa.schema(columns), compression="zstd") as parquet:

                def write_table(rows: Rows, own: Rows) -> None:
                    written = whole(rows, own)
                    arrays = [_array([row.get(name) for row in written], kind) for name, kind in columns.items()]
                    parquet.write_table(pa.Table.from_arrays(arrays, schema=schema))

                yield write_table


def in_chunks(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """The rows in lists of `size`; the last list may be shorter."""
    iterator = iter(rows)
    while chunk := list(islice(iterator, size)):
        yield chunk


def _kind_of(value: object) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "null"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int" if abs(value) <= _EXACT_FLOAT else "large int" if -_INT64 <= value < _INT64 else "other"
    return {float: "float", str: "str"}.get(type(value), "other")


def _type_for(kinds: set[str]) -> pa.DataType:
    """The type that holds all values of a column unchanged; text if there is no such type."""
    kinds = kinds - {"null"}
    if kinds == {"bool"}:
        return pa.bool_()
    if kinds and kinds <= {"int", "large int"}:
        return pa.int64()
    if kinds and kinds <= {"int", "float"}:
        return pa.float64()
    return pa.string()


def _array(values: list[Any], kind: pa.DataType) -> pa.Array:
    if not pa.types.is_floating(kind):  # JSON of pandas has NaN where nothing is
        values = [None if _kind_of(value) == "null" else value for value in values]
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return pa.array([_text(value) for value in values], kind)
    if pa.types.is_floating(kind):
        return pa.array([None if value is None else float(value) for value in values], kind)
    if pa.types.is_temporal(kind):  # a time that Python cannot hold, such as the year 10000, arrives as text
        return pa.array([None if isinstance(value, str) else value for value in values], kind)
    return pa.array(values, kind)


def _text(value: object) -> str | None:
    """A cell as text; a byte that is not UTF-8 becomes its escape."""
    if value is None:
        return None
    if isinstance(value, bytes):
        return json_text(value)
    text = value if isinstance(value, str) else json.dumps(_plain(value), ensure_ascii=False, default=json_text)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _plain(value: Any) -> Any:
    """The value with null for numbers that JSON does not have (NaN and infinity)."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value
