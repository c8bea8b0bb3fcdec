"""Examples: which test rows a version answers rightly that the version before it did not, and the other way round."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import pyarrow.parquet as pq

from deal_core.evaluation.metrics import exact_match
from infra.report.run_report import Changed, Example
from infra.store.base import ObjectStore
from infra.temporary import temporary_folder
from tasks.adaptation.kept_answers import read_answers
from tasks.lineage.record import KnownTask, read_record

MAX_EXAMPLES = 10
"""Of each kind and task."""
MAX_CHARS = 400
"""Of each text that is shown."""


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
