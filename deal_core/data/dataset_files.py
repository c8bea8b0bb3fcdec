"""The files of a dataset while they are written: a dataset appears complete or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Self, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from deal_core.data.rows import BadRow
from deal_core.data.schema import REFERENCES, REJECTED, ROW_SCHEMA, DatasetManifest, Split
from deal_core.regular_file import complete_file

_GROUP_ROWS = 8192
_GROUP_BYTES = 2**24


class DatasetFiles:
    """Writes train.parquet and test.parquet in row groups, quarantine.jsonl, and at the end manifest.json.

    A line of quarantine.jsonl has file, row, line, reason, value, why, more problems if any, and the raw row. If the
    context ends without `publish`, only quarantine.jsonl remains: an unfinished dataset never looks finished.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        for name in ("manifest.json", "train.parquet", "test.parquet"):
            (folder / name).unlink(missing_ok=True)
        self._tables = {split: _RowWriter(folder / f"{split}.parquet.part") for split in ("train", "test")}
        self.quarantine_path = folder / "quarantine.jsonl"
        # A lone surrogate (a byte that was not UTF-8) becomes its JSON escape.
        self._quarantine: TextIO = self.quarantine_path.open(
            "w", encoding="utf-8", errors="backslashreplace", newline="\n"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._quarantine.close()
        for table in self._tables.values():
            table.close()
            table.path.unlink(missing_ok=True)

    def add(self, rows: pa.Table, split: Split) -> None:
        """Write good rows with the columns of ROW_SCHEMA; some of the tables may have REFERENCES or REJECTED too."""
        self._tables[split].add(rows)

    def reject(self, bad: BadRow, raw: object) -> None:
        """Write one bad row to quarantine.jsonl."""
        first, *more = bad.problems
        entry = {"file": bad.file, "row": bad.row, "line": bad.line, **first._asdict()}
        if more:
            entry["more"] = [problem._asdict() for problem in more]
        self._quarantine.write(json.dumps({**entry, "raw": raw}, ensure_ascii=False, default=_as_json) + "\n")

    def publish(self, manifest: DatasetManifest) -> None:
        """Move the finished files to their final names."""
        for split, table in self._tables.items():
            table.close()
            os.replace(table.path, self._folder / f"{split}.parquet")
        with complete_file(self._folder / "manifest.json") as part:
            part.write_text(json.dumps(manifest.to_json(), ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


class _RowWriter:
    """Writes rows to one Parquet file by row groups."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._writer = _writer(path, ROW_SCHEMA)
        self._waiting = ROW_SCHEMA.empty_table()

    def add(self, rows: pa.Table) -> None:
        for field in (REFERENCES, REJECTED):
            if field.name in rows.column_names and field.name not in self._waiting.column_names:
                self._widen(field)
        self._waiting = pa.concat_tables([self._waiting, rows], promote_options="default")
        if self._waiting.num_rows >= _GROUP_ROWS or self._waiting.nbytes >= _GROUP_BYTES:
            self._flush()

    def close(self) -> None:
        if self._writer.is_open:
            self._flush()
            self._writer.close()

    def _flush(self) -> None:
        if self._waiting.num_rows:
            self._writer.write_table(self._waiting, row_group_size=_GROUP_ROWS)
        self._waiting = self._waiting.schema.empty_table()

    def _widen(self, field: pa.Field) -> None:
        """Give the file one more column, which is null for the rows so far."""
        self._flush()
        self._writer.close()
        narrow = self.path.with_name(f"{self.path.name}.narrow")
        os.replace(self.path, narrow)
        schema = self._waiting.schema.append(field)
        self._writer, self._waiting = _writer(self.path, schema), schema.empty_table()
        with pq.ParquetFile(narrow, memory_map=False) as before:
            for index in range(before.num_row_groups):
                rows = before.read_row_group(index)
                self._writer.write_table(rows.append_column(field, pa.nulls(rows.num_rows, field.type)))
        narrow.unlink()


def _writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    # Texts and digests rarely repeat, so a dictionary would be built and discarded.
    return pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=["output"])


def _as_json(value: object) -> str:
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)
