"""The files of a dataset while they are written: a dataset appears complete or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from deal_core.data.arrow_rows import digests_in, hex_texts
from deal_core.data.rows import BadRow, json_text
from deal_core.data.schema import ROW_SCHEMA, DatasetManifest, Split, TaskSchema, stored_columns
from deal_core.regular_file import complete_file, sha256_of_file

_GROUP_ROWS = 8192
_GROUP_BYTES = 2**24


class DatasetFiles:
    """Writes train.parquet and test.parquet in row groups, quarantine.jsonl, and at the end manifest.json.

    train.inputs has the digests of the training rows' inputs, 32 bytes each.

    A line of quarantine.jsonl has file, row, line, reason, value, why, more problems if any, and the raw row. If the
    context ends without `publish`, only quarantine.jsonl remains: an unfinished dataset never looks finished.
    """

    def __init__(self, folder: Path, task: TaskSchema) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        for name in ("manifest.json", "train.parquet", "test.parquet", "train.inputs"):
            (folder / name).unlink(missing_ok=True)
        self._tables: dict[Split, _RowWriter] = {
            "train": _RowWriter(folder / "train.parquet.part", stored_columns(task, "train")),
            "test": _RowWriter(folder / "test.parquet.part", stored_columns(task, "test")),
        }
        self._inputs_path = folder / "train.inputs.part"
        self._inputs = self._inputs_path.open("wb")
        self.quarantine_path = folder / "quarantine.jsonl"
        # A lone surrogate (a byte that was not UTF-8) becomes its JSON escape.
        self._quarantine = self.quarantine_path.open("w", encoding="utf-8", errors="backslashreplace", newline="\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._quarantine.close()
        self._inputs.close()
        self._inputs_path.unlink(missing_ok=True)
        for table in self._tables.values():
            table.close()
            table.path.unlink(missing_ok=True)

    def add(self, rows: pa.RecordBatch, split: Split) -> None:
        """Write good rows, see GOOD_ROWS."""
        self._tables[split].add(rows)
        if split == "train":
            self._inputs.write(digests_in(rows, "input_digest").tobytes())

    def training_rows(self) -> Iterator[pa.RecordBatch]:
        """Yield the inputs and outputs of the training rows in order. No row can be added afterwards."""
        self._tables["train"].close()
        with pq.ParquetFile(self._tables["train"].path) as file:
            yield from file.iter_batches(_GROUP_ROWS, columns=["input", "output"], use_threads=False)

    def leave_out(self, is_left_out: npt.NDArray[np.bool_]) -> None:
        """Write the training rows again without some of them, after `training_rows`."""
        self._inputs.close()
        table, inputs_path = self._tables["train"].like(".kept"), self._inputs_path.with_suffix(".kept")
        try:
            with (
                pq.ParquetFile(self._tables["train"].path) as before,
                self._inputs_path.open("rb") as inputs,
                inputs_path.open("wb") as kept_inputs,
            ):
                place = 0
                for rows in before.iter_batches(_GROUP_ROWS, use_threads=False):
                    is_kept = ~is_left_out[place : place + rows.num_rows]
                    table.add_stored(rows.filter(pa.array(is_kept)))
                    kept_inputs.write(np.frombuffer(inputs.read(32 * rows.num_rows), "V32")[is_kept].tobytes())
                    place += rows.num_rows
            table.close()
            os.replace(table.path, self._tables["train"].path)
            os.replace(inputs_path, self._inputs_path)
        finally:
            table.close()
            table.path.unlink(missing_ok=True)
            inputs_path.unlink(missing_ok=True)

    def reject(self, bad: BadRow, raw: object) -> None:
        """Write one bad row to quarantine.jsonl."""
        first, *more = bad.problems
        entry = {"file": bad.file, "row": bad.row, "line": bad.line, **first._asdict()}
        if more:
            entry["more"] = [problem._asdict() for problem in more]
        self._quarantine.write(json.dumps({**entry, "raw": raw}, ensure_ascii=False, default=json_text) + "\n")

    def publish(self, manifest: DatasetManifest) -> DatasetManifest:
        """Move the finished files to their final names; return the manifest with the digest of the test rows' file."""
        for split, table in self._tables.items():
            table.close()
            os.replace(table.path, self._folder / f"{split}.parquet")
        self._inputs.close()
        os.replace(self._inputs_path, self._folder / "train.inputs")
        manifest = replace(manifest, test_sha256=sha256_of_file(self._folder / "test.parquet"))
        with complete_file(self._folder / "manifest.json") as part:
            part.write_text(json.dumps(manifest.to_json(), ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        return manifest


class NoFiles:
    """Takes rows in place of `DatasetFiles` where they are only checked.

    The training rows are compared with the test rows in the end. Until then they are in a file without a name, so that
    a killed process leaves none.
    """

    def __init__(self) -> None:
        self._file = TemporaryFile()  # noqa: SIM115  # it is closed at the end of this context
        schema = pa.schema([ROW_SCHEMA.field("input"), ROW_SCHEMA.field("output")])
        self._writer = pa.ipc.new_stream(self._file, schema, options=pa.ipc.IpcWriteOptions(compression="zstd"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def add(self, rows: pa.RecordBatch, split: Split) -> None:
        """See `DatasetFiles.add`."""
        if split == "train":
            self._writer.write_batch(rows.select(["input", "output"]))

    def training_rows(self) -> Iterator[pa.RecordBatch]:
        """See `DatasetFiles.training_rows`."""
        self._writer.close()
        self._file.seek(0)
        yield from pa.ipc.open_stream(self._file)

    def leave_out(self, is_left_out: npt.NDArray[np.bool_]) -> None:
        """See `DatasetFiles.leave_out`."""

    def reject(self, bad: BadRow, raw: object) -> None:
        """See `DatasetFiles.reject`."""


class _RowWriter:
    """Writes rows to one Parquet file by row groups."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path = path
        self._schema = schema
        # Texts and digests rarely repeat, so a dictionary would be built and discarded.
        # Checksums let `deal data delete` tell damaged texts from others.
        self._writer = pq.ParquetWriter(
            path, schema, compression="zstd", use_dictionary=["output"], write_page_checksum=True
        )
        self._waiting: list[pa.RecordBatch] = []

    def like(self, suffix: str) -> _RowWriter:
        """A writer of the same columns, to a file with another suffix."""
        return _RowWriter(self.path.with_suffix(suffix), self._schema)

    def add(self, rows: pa.RecordBatch) -> None:
        rows = rows.append_column("sha256", hex_texts(digests_in(rows, "digest"))).select(self._schema.names)
        self.add_stored(rows.cast(self._schema))

    def add_stored(self, rows: pa.RecordBatch) -> None:
        """Add rows that have the columns of the file."""
        self._waiting.append(rows)
        num_rows, num_bytes = (sum(getattr(part, name) for part in self._waiting) for name in ("num_rows", "nbytes"))
        if num_rows >= _GROUP_ROWS or num_bytes >= _GROUP_BYTES:
            self._flush()

    def close(self) -> None:
        if self._writer.is_open:
            if self._waiting:
                self._flush()
            self._writer.close()

    def _flush(self) -> None:
        self._writer.write_table(pa.Table.from_batches(self._waiting).combine_chunks(), row_group_size=_GROUP_ROWS)
        self._waiting = []
