"""Files of rows, and the datasets that they become."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from deal_core.config import DataConfig
from deal_core.data.dataset import Landing, ValidationReport, build_dataset, validate_file
from deal_core.data.rows import stored_input_digest
from deal_core.data.schema import ROW_SCHEMA, DatasetManifest, TaskSchema
from deal_core.data.source_files import SourceFiles, files_at

AUTO = TaskSchema(name="t", format="auto", metric="auto")
LENIENT = DataConfig(max_bad_share=1.0)


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    """Write a file of the kind that its name says. A text or bytes among JSON lines is a line of its own."""
    kind, rows = path.name.removesuffix(".gz").rpartition(".")[2], list(rows)
    if kind == "parquet":
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), sink)
        content = sink.getvalue()
    elif kind == "csv":
        cells = io.StringIO(newline="")
        writer = csv.DictWriter(cells, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        content = cells.getvalue().encode()
    elif kind == "json":
        content = json.dumps(rows).encode()
    else:
        lines = (row if isinstance(row, str | bytes) else json.dumps(row, ensure_ascii=False) for row in rows)
        content = b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def chat(*contents: str) -> list[dict[str, Any]]:
    """A chat whose first message is the user's."""
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(contents)]


@dataclass(frozen=True)
class Built:
    """A dataset, or what is left of one that was refused."""

    folder: Path
    manifest: DatasetManifest

    def rows(self, *splits: str) -> list[dict[str, Any]]:
        tables = [pq.read_table(self.folder / f"{split}.parquet") for split in splits or ("train", "test")]
        return [row for table in tables for row in table.to_pylist()]

    def inputs(self, *splits: str) -> set[str]:
        return {row["input"] for row in self.rows(*splits)}

    def input_digests(self, split: str) -> list[bytes]:
        form = self.manifest.task.format
        assert form != "auto"
        return [stored_input_digest(form, row["input"]) for row in self.rows(split)]

    @property
    def bad(self) -> list[dict[str, Any]]:
        return quarantine_of(self.folder)


def quarantine_of(folder: Path) -> list[dict[str, Any]]:
    with (folder / "quarantine.jsonl").open(encoding="utf-8") as lines:  # a row may hold other line ends
        return [json.loads(line) for line in lines]


def landing(sources: Path | SourceFiles, task: TaskSchema = AUTO, config: DataConfig = LENIENT, **more: Any) -> Landing:
    return Landing(
        sources=files_at(sources) if isinstance(sources, Path) else sources, task=task, config=config, **more
    )


def check(
    sources: Path | SourceFiles,
    *arguments: Any,
    on_rows: Callable[[pa.RecordBatch], None] = lambda rows: None,
    **more: Any,
) -> ValidationReport:
    return validate_file(landing(sources, *arguments, **more), on_rows)


def build(sources: Path | SourceFiles, *arguments: Any, **more: Any) -> Built:
    """The dataset beside its file; its counts and its files agree with each other."""
    landed = landing(sources, *arguments, **more)
    folder = landed.sources[0].path.parent / "dataset"
    manifest = build_dataset(landed, folder)
    built = Built(folder, manifest)
    assert DatasetManifest.from_json(json.loads((folder / "manifest.json").read_text())) == manifest
    assert manifest.num_read + manifest.num_turns == manifest.num_train + manifest.num_test + manifest.num_rejected
    assert (len(built.rows("train")), len(built.rows("test"))) == (manifest.num_train, manifest.num_test)
    assert len(built.bad) == manifest.num_rejected
    assert {*manifest.problems} >= {entry["reason"] for entry in built.bad}
    assert (folder / "train.inputs").read_bytes() == b"".join(built.input_digests("train"))
    assert all(pq.read_schema(folder / f"{split}.parquet").names[:3] == ROW_SCHEMA.names for split in ("train", "test"))
    files = ["manifest.json", "quarantine.jsonl", "test.parquet", "train.inputs", "train.parquet"]
    assert sorted(path.name for path in folder.iterdir()) == files
    return built
