"""The reference of a version: its own answers to the frozen test rows, as rows of the prediction log with a score.

It lies beside the adapter as `reference.parquet`. It has digests of inputs and no texts.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import pandas as pd

from deal_core.monitoring.predictions import COLUMNS, answer_facts
from infra.store.base import ObjectStore
from infra.store.keys import TEST_FILE
from infra.store.stored import reading_stored
from tasks.adaptation.frozen_rows import TestSet, read_test_rows
from tasks.lineage.record import KnownTask, LineageRecord

if TYPE_CHECKING:
    from deal_core.evaluation.score import TaskEvaluation

REFERENCE_FILE = "reference.parquet"
REFERENCE_COLUMNS = (*COLUMNS, "score")


def write_reference(
    store: ObjectStore, adapter_uri: str, lineage: str, sets: Sequence[TestSet], found: Mapping[str, TaskEvaluation]
) -> None:
    """Write the answers of an evaluation beside the adapter. A task that was measured and not answered is left out."""
    rows = [row for each in sets for row in reference_rows(lineage, each, found[each.schema.name])]
    _write(store, adapter_uri, pd.DataFrame(rows, columns=list(REFERENCE_COLUMNS)))


def reference_rows(lineage: str, test_set: TestSet, found: TaskEvaluation) -> list[dict[str, object]]:
    """Return one task's answers as rows. A row's id is the digest of the test row; the version is not known yet."""
    schema = test_set.schema
    if not found.confidences:
        return []
    rows = zip(test_set.rows["sha256"], test_set.rows["input"], found.answers, found.confidences, found.outcomes,
               strict=True)  # fmt: skip
    shared = {"lineage": lineage, "version": None, "time": None, "seconds": None, "input": None, "output": None}
    return [
        {
            **shared, **answer_facts(schema, text, answer), "id": digest, "confidence": confidence.confidence,
            "label_mass": confidence.label_mass, "score": score,
        }
        for digest, text, answer, confidence, score in rows
    ]  # fmt: skip


def has_reference(store: ObjectStore, adapter_uri: str) -> bool:
    """Whether a version has a reference."""
    return store.exists(f"{adapter_uri}/{REFERENCE_FILE}")


def read_reference(store: ObjectStore, adapter_uri: str) -> pd.DataFrame | None:
    """Read the reference of a version; None: it has none.

    Raises:
        StoreError: The file is damaged.
    """
    if not has_reference(store, adapter_uri):
        return None
    return _read(store, f"{adapter_uri}/{REFERENCE_FILE}")


def _read(store: ObjectStore, key: str) -> pd.DataFrame:
    remedy = "Delete it and write it again with deal evaluate; until then live traffic is not compared."
    return read_frame(store, key, "the reference of a version", remedy)


def read_frame(store: ObjectStore, key: str, what: str, remedy: str) -> pd.DataFrame:
    """Read a table of the store; for `what` and `remedy` see `reading_stored`.

    Raises:
        StoreError: The table is damaged.
    """
    with reading_stored(store, key, what, remedy):
        try:
            return pd.read_parquet(io.BytesIO(store.get_bytes(key)))
        except OSError as error:
            raise ValueError(str(error)) from None


def write_frame(store: ObjectStore, key: str, frame: pd.DataFrame) -> None:
    """Write a table into the store."""
    content = io.BytesIO()
    frame.to_parquet(content, index=False)
    store.put_bytes(key, content.getvalue())


def forget_reference(store: ObjectStore, key: str, task: str) -> None:
    """Remove a task's rows from a reference. All of them are test rows of one arrival. Can be repeated."""
    frame = _read(store, key)
    left = frame[frame["task"] != task]
    if left.empty:
        store.delete(key)
    elif len(left) < len(frame):
        write_frame(store, key, left)


def holds_task(store: ObjectStore, key: str, task: str) -> bool:
    """Whether a reference has rows of a task."""
    return store.exists(key) and bool((_read(store, key)["task"] == task).any())


def with_texts(store: ObjectStore, record: LineageRecord, reference: pd.DataFrame) -> pd.DataFrame:
    """Return the reference with the texts of the test rows, where the store still has them."""
    texts: dict[str, str] = {}
    for known in record.tasks:
        if store.exists(f"{known.dataset_uri}/{TEST_FILE}"):
            texts |= _texts_of(store, known)
    return reference.assign(input=reference["id"].map(texts))


def _texts_of(store: ObjectStore, known: KnownTask) -> dict[str, str]:
    table = read_test_rows(store, known.dataset_uri, ("sha256", "input"))
    return dict(zip(table["sha256"].to_pylist(), table["input"].to_pylist(), strict=True))


def _write(store: ObjectStore, adapter_uri: str, frame: pd.DataFrame) -> None:
    kinds = {"time": "float64", "seconds": "float64", "confidence": "float64", "label_mass": "float64",
             "score": "float64", "is_label": "boolean"}  # fmt: skip
    texts = dict.fromkeys(("id", "lineage", "version", "task", "input_sha256", "label", "input", "output"), "string")
    write_frame(store, f"{adapter_uri}/{REFERENCE_FILE}", frame.astype({**kinds, **texts}))
