"""The inputs of rows that have landed, as digests. They name the rows of the prediction log without their texts."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress

import pyarrow.parquet as pq

from deal_core.data.chats import earlier_turns
from deal_core.data.reading.lines import sha256_of_input
from deal_core.data.reading.readers import read_batches
from deal_core.data.row_checks import RowChecker
from deal_core.data.rows import stored_input_digest
from deal_core.data.schema import TaskSchema
from deal_core.data.shapes import recognise
from deal_core.errors import DataValidationError, StoreError
from infra.store import keys
from infra.store.base import ObjectStore
from tasks.data_files import local_files
from tasks.inbox import list_arrivals


def task_inputs(store: ObjectStore, schema: TaskSchema) -> frozenset[str]:
    """Return the digests of a task's inputs that have landed: those of its files in the inbox and of its stored rows.

    Training rows that the store no longer keeps, and whose file is not in the inbox, are not among them. The schema has
    the names of columns that the files in the inbox have.
    """
    inputs: set[str] = set()
    for arrival in list_arrivals(store.list(keys.inbox_folder(schema.name))):
        for info in arrival.files:
            inputs |= inputs_of_file(store, info.key, schema)[0]
    listing = store.list(f"{keys.DATASETS}/{schema.name}")
    for sha256 in {keys.dataset_sha256(info.key) for info in listing if keys.file_name(info.key) == keys.MANIFEST_FILE}:
        for key, digests in inputs_of_dataset(store, schema, sha256):
            if digests is None:
                raise StoreError(f"{store.uri_of(key)} is damaged; restore it from a backup of the store.")
            inputs |= digests
    return frozenset(inputs)


def inputs_of_dataset(store: ObjectStore, schema: TaskSchema, sha256: str) -> Iterator[tuple[str, set[str] | None]]:
    """The inputs of a dataset's stored rows, with the key of their file, once for each lineage with the dataset.

    None: the file is damaged. The reader of a damaged file may raise any error, and the checksums of the pages show
    damage that it would read as other texts.
    """
    for info in store.list(keys.dataset_folder(schema.name, sha256)):
        if keys.file_name(info.key) in (keys.TRAIN_FILE, keys.TEST_FILE):
            content, inputs = store.get_bytes(info.key), None
            with suppress(Exception):
                table = pq.read_table(io.BytesIO(content), columns=["input"], page_checksum_verification=True)
                inputs = set(_digests(schema, table.column("input").to_pylist()))
            yield info.key, inputs


def inputs_of_file(store: ObjectStore, key: str, schema: TaskSchema) -> tuple[set[str], str | None]:
    """The inputs of a file's rows, and the digest of the file; None: it could not be read to its end.

    Single rows that cannot be read were never learned.
    """
    inputs: set[str] = set()
    with local_files(store, store.uri_of(key)) as (file,):
        try:
            checker = RowChecker(schema, recognise(file.path, schema), sys.maxsize)
            for batch in read_batches(file.path):
                texts = (text for text in checker.check_inputs(batch) if isinstance(text, str))
                inputs.update(_digests(schema, texts))
        except DataValidationError:
            return inputs, None
        return inputs, sha256_of_input(file.path)


def _digests(schema: TaskSchema, texts: Iterable[str]) -> Iterator[str]:
    """The digests of inputs, and those of a chat's earlier turns, which are learned as rows of their own."""
    assert schema.format != "auto", "a task that was learned has a format"
    for stored in texts:
        yield stored_input_digest(schema.format, stored).hex()
        if schema.format == "chat":
            yield from (row.input_digest.hex() for row in earlier_turns(stored))
