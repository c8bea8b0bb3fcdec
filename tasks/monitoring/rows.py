"""The rows that a look compares: a version's reference, and its live rows.

The reference, `reference.parquet` beside the adapter, has the version's own answers to the frozen test rows, as rows of
the prediction log with a score. It has digests of inputs and no texts. The live rows come from the prediction log, or
from a file of answers that another server gave.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from deal_core.data.answer_files import OWN_COLUMNS, survey_rows
from deal_core.data.check import RowChecker
from deal_core.data.columns import find_input
from deal_core.data.reading.readers import read_rows
from deal_core.data.rows import RawRow
from deal_core.errors import ConfigError
from deal_core.monitoring.feedback import is_empty
from deal_core.monitoring.predictions import COLUMNS, answer_facts
from infra.predictions import read_predictions
from infra.promotions import PromotionLog
from infra.store.base import ObjectStore
from infra.store.keys import TEST_FILE
from infra.store.stored import reading_stored
from tasks.lineage.frozen_rows import TestSet, read_test_rows
from tasks.lineage.record import LineageRecord, choose_task

if TYPE_CHECKING:
    from deal_core.evaluation.score import TaskEvaluation

REFERENCE_FILE = "reference.parquet"
OF_LOG = ("task", "input_sha256", "chars", "label", "confidence")
"""Columns by which a file with the log's columns is recognised."""
NUMBERS = ("time", "chars", "confidence", "label_mass", "num_answer_chars", "seconds")


def write_reference(
    store: ObjectStore, adapter_uri: str, lineage: str, sets: Sequence[TestSet], found: Mapping[str, TaskEvaluation]
) -> None:
    """Write the answers of an evaluation beside the adapter. A task that was measured and not answered is left out."""
    rows = [row for each in sets for row in _reference_rows(lineage, each, found[each.schema.name])]
    numbers = dict.fromkeys(("time", "seconds", "confidence", "label_mass", "score"), "float64")
    texts = dict.fromkeys(("id", "lineage", "version", "task", "input_sha256", "label", "input", "output"), "string")
    frame = pd.DataFrame(rows, columns=[*COLUMNS, "score"]).astype({**numbers, "is_label": "boolean", **texts})
    write_frame(store, f"{adapter_uri}/{REFERENCE_FILE}", frame)


def _reference_rows(lineage: str, test_set: TestSet, found: TaskEvaluation) -> list[dict[str, object]]:
    """One task's answers as rows. A row's id is the digest of the test row; the version is not known yet."""
    if not found.confidences:
        return []
    rows = zip(
        test_set.rows["sha256"], test_set.rows["input"], found.answers, found.confidences, found.outcomes, strict=True
    )
    shared = {"lineage": lineage, "version": None, "time": None, "seconds": None, "input": None, "output": None}
    return [
        {
            **shared,
            **answer_facts(test_set.schema, text, answer),
            "id": digest,
            "confidence": confidence.confidence,
            "label_mass": confidence.label_mass,
            "score": score,
        }
        for digest, text, answer, confidence, score in rows
    ]


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
    remedy = "Delete it and write it again with deal version evaluate; until then live traffic is not compared."
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
            rows = read_test_rows(store, known.dataset_uri, ("sha256", "input"))
            texts |= zip(rows["sha256"].to_pylist(), rows["input"].to_pylist(), strict=True)
    return reference.assign(input=reference["id"].map(texts))


def logged_rows(store: ObjectStore, lineage: str, version: str) -> pd.DataFrame:
    """Return the rows that a version has answered since it became champion the last time."""
    since = champion_since(store, lineage, version)
    return read_predictions(store, lineage, version=version, since=since)


def champion_since(store: ObjectStore, lineage: str, version: str) -> float | None:
    """Return when a version became champion the last time, in UTC seconds; None: the log does not say."""
    newest_first = reversed(PromotionLog(store).moves(lineage))
    own = list(takewhile(lambda move: move.champion == version, newest_first))
    return own[-1].when.timestamp() if own else None


class FileRows(NamedTuple):
    """The answers of a version in a file."""

    rows: pd.DataFrame
    num_faulty: int
    """Rows that cannot be read. They are left out."""


def rows_of_file(path: Path, record: LineageRecord, version: str) -> FileRows:
    """Read answers of a version from a file: with the columns of the log, or as `deal predict --data` writes it.

    A file of the second kind has a column with the inputs and a column `answer`; `task`, `lineage` and `version` may be
    missing. It has no confidences, so neither these are compared nor is accuracy estimated. A row without a task is of
    the task learned last. Rows without an answer and rows of other versions are left out.

    Raises:
        ConfigError: The file has neither kind of columns, a task is unknown, or no row is of the version.
        DataValidationError: The file cannot be read.
    """
    columns = list(survey_rows(path).types)
    num_faulty = 0

    def readable() -> Iterator[RawRow]:
        nonlocal num_faulty
        for row in read_rows(path):
            if row.fault is None:
                yield row
            num_faulty += row.fault is not None

    if set(OF_LOG) <= set(columns):
        last = choose_task(record, None).schema.name
        rows = [{**dict.fromkeys(COLUMNS), **row.values} for row in readable()]
        rows = [{**row, "task": last if is_empty(row["task"]) else row["task"]} for row in rows]
    elif _own(columns)["answer"] in columns:
        rows = [*_answered(path, readable(), columns, record)]
    else:
        raise ConfigError(
            f"{path.name} has neither the columns of the prediction log ({', '.join(OF_LOG)}, …) nor a column "
            "'answer'; give a file of deal predict --data, or one with these columns."
        )
    found = _typed(pd.DataFrame(rows, columns=list(COLUMNS)), record)
    known = found["version"].fillna(version).astype(str)
    own = found[(known == version) & found["lineage"].fillna(record.lineage).eq(record.lineage)]
    if own.empty:
        others = ", ".join(sorted(set(known)))
        raise ConfigError(
            f"{path.name} has no answer of version {version} of {record.lineage}"
            + (f", only of version {others}" if others else "")
            + "; give a file that this version has answered."
        )
    return FileRows(own.assign(version=version, lineage=record.lineage), num_faulty)


def _own(columns: list[str]) -> dict[str, str]:
    """Name of each column that `deal predict` has added: if the input had the name already, it begins with deal_."""
    return {name: f"deal_{name}" if f"deal_{name}" in columns else name for name in OWN_COLUMNS}


def _answered(
    path: Path, rows: Iterable[RawRow], columns: list[str], record: LineageRecord
) -> Iterator[dict[str, Any]]:
    own = _own(columns)
    others = [name for name in columns if name not in own.values()]
    checkers: dict[str, RowChecker] = {}
    for row in rows:
        values: Mapping[str, Any] = row.values
        answer = values.get(own["answer"])
        if not isinstance(answer, str):
            continue
        name = values.get(own["task"])
        schema = choose_task(record, None if is_empty(name) else str(name)).schema
        if schema.name not in checkers:
            found = find_input(others, schema, path.name)
            checkers[schema.name] = RowChecker(schema, found, max_text_chars=sys.maxsize)
        text = checkers[schema.name].check_input(row)
        if isinstance(text, str):
            yield {
                **dict.fromkeys(COLUMNS),
                **answer_facts(schema, text, answer),
                "input": text,
                "output": answer,
                "lineage": values.get(own["lineage"]),
                "version": values.get(own["version"]),
            }


def _typed(found: pd.DataFrame, record: LineageRecord) -> pd.DataFrame:
    """Give the columns their types; a CSV has texts only."""
    empty = found.map(lambda value: None if value == "" else value)
    numbers = {name: pd.to_numeric(empty[name], errors="coerce") for name in NUMBERS}
    labels = {task.schema.name for task in record.tasks if task.schema.labels}
    is_label = [
        label is not None and not pd.isna(label) if task in labels else None
        for task, label in zip(empty["task"], empty["label"], strict=True)
    ]
    return empty.assign(**numbers, is_label=pd.array(is_label, dtype="boolean"))
