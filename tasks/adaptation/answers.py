"""The answers of a version and of its parent to every test row, and which rows were gained or lost.

The answers stay in the object store next to the adapter, like the rows. MLflow gets none of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow.parquet as pq

from deal_core.errors import StoreError
from deal_core.evaluation.metrics import exact_match
from deal_core.schema_version import require_schema_version
from infra.report.run_report import Changed, Example
from infra.store.base import ObjectStore, temporary_folder
from tasks.lineage.record import KnownTask, read_record
from tasks.lineage.version_files import reading_stored

SCHEMA_VERSION = 1
ANSWERS_FILE = "answers.json"

Answers = dict[str, dict[str, str]]
"""Task to the digest (sha256) of a test row to the answer."""
MAX_EXAMPLES = 10
"""Of each kind and task."""
MAX_CHARS = 400
"""Of each text that is shown."""


@dataclass(frozen=True)
class KeptAnswers:
    """The answers that an evaluation generated."""

    now: Answers
    """The version's, on every task of its lineage."""
    before: Answers
    """On a task that was new: the parent's, or for a first version the untouched base model's. On others the parent's
    too, where its own evaluation had not asked it all of their rows."""


def keep_answers(store: ObjectStore, adapter_uri: str, answers: KeptAnswers) -> None:
    """Put an evaluation's answers beside the adapter that it is of."""
    values = {"schema_version": SCHEMA_VERSION, "now": answers.now, "before": answers.before}
    store.put_bytes(f"{adapter_uri}/{ANSWERS_FILE}", json.dumps(values, ensure_ascii=False).encode("utf-8", "replace"))


def read_answers(store: ObjectStore, adapter_uri: str) -> KeptAnswers | None:
    """The answers beside an adapter; None where an earlier release kept none.

    Raises:
        StoreError: they are damaged, or of another schema version.
    """
    key = f"{adapter_uri}/{ANSWERS_FILE}"
    if not store.exists(key):
        return None
    remedy = "Restore it from a backup of the store, or delete it: the next evaluation then asks its rows anew."
    with reading_stored(store, key, "the kept answers of a version", remedy):
        values = json.loads(store.get_bytes(key))
        require_schema_version(values, SCHEMA_VERSION, "the file", StoreError)
        return KeptAnswers(now=dict(values["now"]), before=dict(values["before"]))


class _Row(NamedTuple):
    input: str
    output: str
    sha256: str


def compare_answers(
    store: ObjectStore, adapter_uri: str, parent_uri: str | None, *, include_texts: bool
) -> tuple[Changed, ...]:
    """A version's answers to every task's frozen test rows beside those of its parent (first version: of the base).

    A task is left out where the answers from before are not there, since an earlier release kept none.

    Args:
        store: holds both adapters and the test rows.
        adapter_uri: the version's adapter, with its record beside it.
        parent_uri: the adapter of the version that it continues; None: it starts from the base.
        include_texts: give texts and answers with the examples, not only the rows' digests.
    """
    kept = read_answers(store, adapter_uri)
    if kept is None:
        return ()
    parent = read_answers(store, parent_uri) if parent_uri else None
    found = []
    for known in read_record(store, adapter_uri).tasks:
        name = known.schema.name
        before = kept.before.get(name) or (parent.now.get(name) if parent else None)
        if before and name in kept.now:
            found.append(_compare(name, list(_test_rows(store, known)), before, kept.now[name], include_texts))
    return tuple(found)


def _compare(
    task: str, rows: list[_Row], before: Mapping[str, str], now: Mapping[str, str], include_texts: bool
) -> Changed:
    gained: list[_Row] = []
    lost: list[_Row] = []
    num_rows = 0
    for row in rows:
        if row.sha256 not in before or row.sha256 not in now:
            continue
        num_rows += 1
        was_right, is_right = (exact_match(said[row.sha256], row.output) for said in (before, now))
        if was_right != is_right:
            (gained if is_right else lost).append(row)

    def some(found: list[_Row]) -> tuple[Example, ...]:
        return tuple(_example(row, before, now, include_texts) for row in found[:MAX_EXAMPLES])

    return Changed(
        task=task, num_rows=num_rows, num_gained=len(gained), num_lost=len(lost), gained=some(gained), lost=some(lost)
    )


def _example(row: _Row, before: Mapping[str, str], now: Mapping[str, str], include_texts: bool) -> Example:
    if not include_texts:
        return Example(row=row.sha256)
    shown = {"text": row.input, "expected": row.output, "before": before[row.sha256], "now": now[row.sha256]}
    return Example(row=row.sha256, **{name: cut(text) for name, text in shown.items()})


def _test_rows(store: ObjectStore, known: KnownTask) -> Iterator[_Row]:
    with temporary_folder() as temporary:
        path = temporary / "test.parquet"
        store.download_file(f"{known.dataset_uri}/test.parquet", path)
        table = pq.read_table(path, columns=list(_Row._fields))
    for values in zip(*(table.column(name).to_pylist() for name in _Row._fields), strict=True):
        yield _Row(*values)


def cut(text: str) -> str:
    """The beginning of a text that is too long to show."""
    return text if len(text) <= MAX_CHARS else text[: MAX_CHARS - 1] + "…"
