"""The inputs of deleted rows, as digests. They outlive the rows: every later search of the prediction log uses them.

    deleted_inputs/TASK/SHA256.parquet   the inputs of the arrival with this digest that are known

A digest is one of the prediction log's column `input_sha256`. A server that logs texts reads them too: it never stores
a deleted text again, however often a client asks it.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from deal_core.errors import StoreError
from infra.store import keys
from infra.store.base import ObjectNotFoundError, ObjectStore

COLUMN = "input_sha256"


class UnknownRows(BaseModel):
    """Deleted rows whose inputs could not be known."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset_sha256: str
    file: str
    """The name of their file in the dataset, such as train.parquet."""
    num_rows: int | None
    """None: no manifest says it."""
    why: Literal["damaged", "gone"]
    """gone: neither the rows nor the files that they came from are stored."""


def keep_deleted(store: ObjectStore, task: str, sha256: str, inputs: Collection[str]) -> None:
    """Store the digests of an arrival's inputs, in place of those that are known of it."""
    if not inputs:
        return
    sink = io.BytesIO()
    pq.write_table(pa.table({COLUMN: pa.array(sorted(inputs), pa.string())}), sink, compression="zstd")
    store.put_bytes(keys.deleted_inputs_key(task, sha256), sink.getvalue())


def read_deleted(store: ObjectStore, task: str, sha256s: Iterable[str]) -> set[str]:
    """Return the stored digests of the inputs of arrivals; StoreError: they are damaged."""
    inputs: set[str] = set()
    for sha256 in sha256s:
        with suppress(ObjectNotFoundError):
            inputs.update(_read(store, keys.deleted_inputs_key(task, sha256)).to_pylist())
    return inputs


class DeletedInputs:
    """The deleted inputs of a store, for a server that logs answers. Each file is read once."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._inputs: dict[tuple[str, str], pa.Array] = {}
        """By key and ETag."""

    def without_texts(self, rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Return rows of the prediction log, those with a deleted input without texts.

        Raises:
            StoreError: The store does not answer, or has a damaged file.
        """
        present = [(info.key, info.etag) for info in self._store.list(keys.DELETED_INPUTS)]
        before = self._inputs
        self._inputs = {each: before[each] if each in before else _read(self._store, each[0]) for each in present}
        asked, is_deleted = pa.array([row[COLUMN] for row in rows], pa.string()), np.zeros(len(rows), bool)
        for inputs in self._inputs.values():
            is_deleted |= pc.is_in(asked, value_set=inputs).to_numpy(zero_copy_only=False)
        no_texts = {"input": None, "output": None}
        return [{**row, **no_texts} if gone else row for row, gone in zip(rows, is_deleted, strict=True)]


def _read(store: ObjectStore, key: str) -> pa.Array:
    content = store.get_bytes(key)
    try:
        return pq.read_table(io.BytesIO(content), columns=[COLUMN]).column(COLUMN).combine_chunks()
    except (pa.ArrowException, OSError, ValueError, KeyError):
        raise StoreError(
            f"{store.uri_of(key)}, the digests of deleted inputs, is damaged. Restore it from a backup, or "
            "delete it: then nobody searches the prediction log for these inputs any more. Until then servers that log "
            "texts store no answers."
        ) from None
