"""A file of rows with their answers. It is written in chunks, so an interrupted run can continue, then merged.

    OUT.partial/state.json           the settings of the run
    OUT.partial/chunk-000000.jsonl   rows of one chunk with their answers (or .parquet)
    OUT.partial/chunk-000000.json    number of these rows; it is written last and marks the chunk as complete

A chunk depends only on its rows, so interruptions do not change a byte of the file.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from deal_core.data.reading.readers import file_kind, look_at, read_rows
from deal_core.data.rows import json_text
from deal_core.errors import ConfigError, DataValidationError
from deal_core.regular_file import complete_file

OutputKind = Literal["jsonl", "parquet"]
OWN_COLUMNS = ("answer", "problem", "task", "lineage", "version")
"""Columns that are added to a row; a name that the file already uses becomes deal_<name>."""
_INT64 = 2**63
_EXACT_FLOAT = 2**53


class Survey(NamedTuple):
    """Number of rows and columns of a file of rows."""

    num_rows: int
    types: dict[str, pa.DataType]
    """Columns in order, with their types in a Parquet file."""


class Counts(NamedTuple):
    """Number of rows of a chunk or of a file, and of rows without an answer."""

    num_rows: int
    num_bad: int


def survey_rows(path: Path) -> Survey:
    """Read a file once to its end and find its columns with the types of their values.

    A column of a CSV is text. A column of JSON lines keeps its type if one type holds all its values; otherwise it is
    text, and values of other types are written as JSON.

    Raises:
        DataValidationError: The file cannot be read to its end, has no rows, or has two columns of one name.
    """
    if file_kind(path) == "parquet":
        look = look_at(path)
        assert look.schema is not None and look.num_rows is not None, "a Parquet file says both"
        fields = list(look.schema)
        if len({field.name for field in fields}) < len(fields):
            raise DataValidationError(f"{path.name} has two columns of the same name; rename one of them.")
        found = Survey(look.num_rows, {field.name: field.type for field in fields})
    else:
        kinds: dict[str, set[str]] = {}
        num_rows = 0
        for raw in read_rows(path):
            num_rows += 1
            for name, value in raw.values.items():
                kinds.setdefault(name, set()).add(_kind_of(value))
        found = Survey(num_rows, {name: _type_for(each) for name, each in kinds.items()})
    if not found.num_rows:
        raise DataValidationError(f"{path.name} has no rows; give a file with rows.")
    return found


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


@dataclass(frozen=True)
class AnswerFiles:
    """A file of answers that is being written, and its chunks."""

    output: Path
    types: Mapping[str, pa.DataType]
    """Columns of the rows, see `Survey.types`."""
    names: Mapping[str, str]
    """Names of the added columns, see `own_names`."""

    @property
    def folder(self) -> Path:
        """Folder of the chunks."""
        return self.output.with_name(f"{self.output.name}.partial")

    def begin(self, state: Mapping[str, Any]) -> None:
        """Begin, or continue a run that was begun with the same state.

        Raises:
            ConfigError: The run was begun with another state, or the file exists already.
        """
        path = self.folder / "state.json"
        if path.is_file():
            before = json.loads(path.read_text(encoding="utf-8"))
            differing = [name for name in state if before.get(name) != state[name]]
            if differing or set(before) != set(state):
                changes = ", ".join(f"{name} {before.get(name)!r} (now {state[name]!r})" for name in differing)
                raise ConfigError(
                    f"{self.folder} was begun with {changes or 'other settings'}; give the same settings to continue "
                    "(--version, --task, --column and the file), or delete the folder to start again."
                )
            return
        if self.output.exists():
            raise ConfigError(f"{self.output} exists already; delete it, or give another --out.")
        self.folder.mkdir(parents=True, exist_ok=True)
        _write(path, json.dumps(dict(state), ensure_ascii=False, indent=2))

    def counts(self, index: int) -> Counts | None:
        """Counts of a complete chunk; None if the chunk is not complete."""
        path = self._chunk(index).with_suffix(".json")
        return Counts(**json.loads(path.read_text())) if path.is_file() else None

    def write_chunk(self, index: int, rows: Sequence[Mapping[str, Any]], own: Sequence[Mapping[str, Any]]) -> Counts:
        """Write the rows of a chunk; `own` holds the added values of each row, by the names of OWN_COLUMNS."""
        path = self._chunk(index)
        added = [{self.names[name]: values.get(name) for name in OWN_COLUMNS} for values in own]
        if output_kind(self.output) == "jsonl":
            both = (_plain({**row, **more}) for row, more in zip(rows, added, strict=True))
            lines = (json.dumps(each, ensure_ascii=False, default=json_text, allow_nan=False) + "\n" for each in both)
            _write(path, "".join(lines))
        else:
            with complete_file(path) as part:
                pq.write_table(self._table(rows, added), part, compression="zstd")
        counts = Counts(len(rows), sum(values.get("answer") is None for values in own))
        _write(path.with_suffix(".json"), json.dumps(counts._asdict()))
        return counts

    def merge(self, num_chunks: int) -> None:
        """Merge the complete chunks into the file, which appears in one step, and remove them."""
        part = self.folder / f"whole{self.output.suffix}"
        if output_kind(self.output) == "jsonl":
            with part.open("wb") as writer:
                for index in range(num_chunks):
                    with self._chunk(index).open("rb") as reader:
                        shutil.copyfileobj(reader, writer, 2**20)
        else:
            with pq.ParquetWriter(part, self._schema(), compression="zstd") as parquet:
                for index in range(num_chunks):
                    parquet.write_table(pq.read_table(self._chunk(index), schema=self._schema(), memory_map=False))
        os.replace(part, self.output)
        done = self.folder.with_name(f"{self.folder.name}-done")  # a half-deleted folder must not look resumable
        shutil.rmtree(done, ignore_errors=True)
        self.folder.rename(done)
        shutil.rmtree(done, ignore_errors=True)

    def _chunk(self, index: int) -> Path:
        return self.folder / f"chunk-{index:06d}{self.output.suffix}"

    def _schema(self) -> pa.Schema:
        own = [pa.field(name, pa.string()) for name in self.names.values()]
        return pa.schema([*(pa.field(name, kind) for name, kind in self.types.items()), *own])

    def _table(self, rows: Sequence[Mapping[str, Any]], added: Sequence[Mapping[str, Any]]) -> pa.Table:
        columns = [_array([row.get(name) for row in rows], kind) for name, kind in self.types.items()]
        columns += [_array([more[name] for more in added], pa.string()) for name in self.names.values()]
        return pa.Table.from_arrays(columns, schema=self._schema())


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
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def _write(path: Path, text: str) -> None:
    """Write a file completely or not at all; a lone surrogate becomes its JSON escape."""
    with complete_file(path) as part, part.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        file.write(text)
