"""Check the files of an arrival on a Ray cluster: its workers read and check parts of files, and send the batches back.

The workers run the code that this machine runs without Ray, and the batches come in the order of the files. So of equal
rows the first one wins, and the dataset has the same digest.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any

import pyarrow as pa

from deal_core.data.batch_check import Checked, CheckedFiles, FileCheck, naming
from deal_core.data.reading.batches import JsonRows, ParquetRows, RowBatch
from deal_core.data.reading.part import WHOLE, Part
from deal_core.data.reading.readers import group_sizes
from deal_core.data.rows import Problem
from deal_core.errors import ConfigError, DataValidationError, DealError, ReaderDiedError
from deal_core.safe_text import shorten

PART_ROWS = 100_000
"""Rows of a Parquet file from which on its next row group begins another part."""
_ERRORS = {kind.__name__: kind for kind in (DataValidationError, ReaderDiedError, DealError)}


def checked_on_ray(files: Sequence[FileCheck]) -> CheckedFiles:
    """Check the files on the cluster of RAY_ADDRESS; without an address, on one that this process starts and ends.

    Every node has to see the files under the same paths.

    Raises:
        ConfigError: Ray is not installed.
        DealError: The cluster failed.
    """
    try:
        ray, data = import_module("ray"), import_module("ray.data")
    except ImportError:
        raise ConfigError("DEAL_INGEST is ray, which is not installed; pip install '.[ray]'.") from None
    with _cluster():
        context = data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        parts = [{"file": place, **part._asdict()} for place, file in enumerate(files) for part in parts_of(file)]
        found = data.from_items(parts, override_num_blocks=len(parts)).map_batches(
            partial(_check_parts, list(files)), batch_size=1
        )
        try:
            for item in found.iter_rows():
                if item["error"]:
                    raise _ERRORS[item["error"]](item["rows"].decode())
                yield item["file"], *_unpacked(item, files[item["file"]])
        except ray.exceptions.RayError as error:
            raise DealError(f"The Ray cluster failed: {str(error).strip().splitlines()[-1]}") from error


def parts_of(file: FileCheck) -> list[Part]:
    """The parts of a file that are checked apart: several row groups of Parquet, or a whole file of text."""
    parts, start, number, num_rows = [], 0, 1, 0
    with naming(file.source):
        sizes = group_sizes(file.source.path)
    for stop, size in enumerate(sizes, 1):
        num_rows += size
        if num_rows >= PART_ROWS or stop == len(sizes):
            parts.append(Part(start, stop, number))
            start, number, num_rows = stop, number + num_rows, 0
    return parts or [WHOLE]


@contextmanager
def _cluster() -> Iterator[None]:
    """Connect to Ray, unless this process is connected already."""
    import ray

    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    place = {"address": address} if address else {"address": "local", "include_dashboard": False}
    try:
        ray.init(**place, log_to_driver=False, logging_level=logging.WARNING)
    except Exception as error:  # Ray raises errors of many kinds here
        raise DealError(f"Ray does not start, or does not answer: {shorten(str(error), 200)}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_parts(files: Sequence[FileCheck], parts: dict[str, Any]) -> Iterator[dict[str, list[Any]]]:
    """Read and check parts of files; a part's error is its last item."""
    for place, *part in zip(*(parts[name].tolist() for name in ("file", *Part._fields)), strict=True):
        try:
            for batch, checked in files[place].batches(Part(*part)):
                yield {"file": [place], **_packed(batch, checked)}
        except DealError as error:
            kind = type(error).__name__ if type(error).__name__ in _ERRORS else DealError.__name__
            said = str(error).encode(errors="backslashreplace")
            yield {"file": [place], "rows": [said], "number": [0], "good": [b""], "bad": [""], "error": [kind]}


def _packed(batch: RowBatch, checked: Checked) -> dict[str, list[Any]]:
    if isinstance(batch, ParquetRows):
        rows, number = _stream(batch.cells), batch.number
    else:
        assert isinstance(batch, JsonRows), "there are no other batches"
        rows, number = batch.content, 0
    good, bad = _stream(checked.good), json.dumps(checked.bad)
    return {"rows": [rows], "number": [number], "good": [good], "bad": [bad], "error": [""]}


def _unpacked(item: dict[str, Any], file: FileCheck) -> tuple[RowBatch, Checked]:
    columns = {*file.columns.names.values()}
    rows = ParquetRows(_batch(item["rows"]), item["number"], columns) if item["number"] else JsonRows(item["rows"])
    bad = [(place, [Problem(*problem) for problem in problems]) for place, problems in json.loads(item["bad"])]
    return rows, Checked(_batch(item["good"]), bad)


def _stream(batch: pa.RecordBatch) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue())


def _batch(stream: bytes) -> pa.RecordBatch:
    return pa.ipc.open_stream(stream).read_next_batch()
