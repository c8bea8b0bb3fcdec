"""The frozen test rows that judge a lineage's tasks, and which of them a new version answers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from deal_core.data.schema import ROW_SCHEMA, TaskSchema
from infra.store.base import ObjectStore, temporary_folder
from infra.store.keys import TEST_FILE
from tasks.lineage.record import KnownTask
from tasks.lineage.tombstones import require_test_rows
from tasks.lineage.version_files import reading_stored

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True, kw_only=True)
class TestSet:
    """The frozen test rows of one task."""

    schema: TaskSchema
    rows: Dataset
    max_prompt_tokens: int
    max_new_tokens: int


def load_test_sets(store: ObjectStore, tasks: Sequence[KnownTask]) -> list[TestSet]:
    """The test sets of tasks that a lineage knows.

    Raises:
        TestRowsForgottenError: the rows of one were forgotten.
    """
    return [
        load_test_set(store, known.schema, known.dataset_uri, known.max_prompt_tokens, known.max_new_tokens)
        for known in tasks
    ]


def within_budget(sets: Sequence[TestSet], learned: str, max_rows: int) -> list[TestSet]:
    """The test sets with no more than `max_rows` rows in all; that of the task just learned is always whole."""
    old = {test_set.schema.name: len(test_set.rows) for test_set in sets if test_set.schema.name != learned}
    shares = share_rows(old, max_rows)
    return [
        replace(test_set, rows=first_rows(test_set.rows, shares[test_set.schema.name]))
        if test_set.schema.name in shares else test_set
        for test_set in sets
    ]  # fmt: skip


def answered_rows(test_set: TestSet, answers: Collection[str]) -> TestSet:
    """The test set with the rows of these digests; whole where none of them is there."""
    found = [number for number, digest in enumerate(test_set.rows["sha256"]) if digest in answers]
    return replace(test_set, rows=test_set.rows.select(found)) if found else test_set


def share_rows(num_rows: Mapping[str, int], max_rows: int) -> dict[str, int]:
    """Share a budget of rows among tasks evenly; what a small task does not need goes to the others.

    No task is left without a row, so that with more tasks than rows the budget is exceeded.

    Example:
        >>> share_rows({"a": 10, "b": 500, "c": 400}, 300)
        {'a': 10, 'c': 145, 'b': 145}
    """
    left, shares = max_rows, {}
    for number, name in enumerate(sorted(num_rows, key=num_rows.__getitem__)):
        shares[name] = min(num_rows[name], max(1, left // (len(num_rows) - number)))
        left -= shares[name]
    return shares


def first_rows(rows: Dataset, num_rows: int) -> Dataset:
    """So many of the rows: those of the smallest digests (column sha256), so that of two shares one holds the other."""
    digests = rows["sha256"]
    return rows.select(sorted(range(len(rows)), key=digests.__getitem__)[:num_rows])


def load_test_set(
    store: ObjectStore, schema: TaskSchema, dataset_uri: str, max_prompt_tokens: int, max_new_tokens: int
) -> TestSet:
    """The test rows of one dataset.

    Raises:
        TestRowsForgottenError: they were forgotten.
        ObjectNotFoundError: their file is missing.
        StoreError: their file is damaged.
    """
    from datasets import Dataset

    require_test_rows(store, schema.name, dataset_uri)
    with temporary_folder() as temporary:
        path = temporary / TEST_FILE
        key = f"{dataset_uri}/{TEST_FILE}"
        remedy = (
            f"Restore it from a backup of the store: without it no version can be judged on '{schema.name}'. Versions "
            "that know the task still predict and serve."
        )
        with reading_stored(store, key, f"the test rows of task '{schema.name}'", remedy):
            store.download_file(key, path)
            rows = Dataset(_read_table(path))
    return TestSet(schema=schema, rows=rows, max_prompt_tokens=max_prompt_tokens, max_new_tokens=max_new_tokens)


def _read_table(path: Path) -> pa.Table:
    try:
        return pq.read_table(path, memory_map=False, columns=ROW_SCHEMA.names)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(str(error)) from None
