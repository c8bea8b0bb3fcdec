"""The rows that a look compares: a version's reference, and its live rows.

The reference, `reference.parquet` beside the adapter, has the version's own answers to the frozen test rows, as rows of
the prediction log with a score. It has digests of inputs and no texts. The live rows come from the prediction log, or
from a file of answers that another server gave.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from deal_core.data.answer_files import OWN_COLUMNS, survey_rows
from deal_core.data.columns import find_input
from deal_core.data.reading.batches import RowList
from deal_core.data.reading.readers import read_rows
from deal_core.data.row_checks import RowChecker
from deal_core.data.rows import RawRow
from deal_core.errors import ConfigError
from deal_core.monitoring.feedback import is_empty
from deal_core.monitoring.predictions import COLUMNS, answer_facts
from infra.promotions import PromotionLog
from infra.store.base import ObjectStore
from infra.store.keys import TEST_FILE
from infra.store.stored import reading_stored
from tasks.lineage.frozen_rows import TestSet, read_test_rows
from tasks.lineage.record import LineageRecord, choose_task

if TYPE_CHECKING:
    from deal_core.evaluation.evaluate import TaskEvaluation

REFERENCE_FILE = "reference.parquet"
OF_LOG = ("task", "input_sha256", "chars", "label", "confidence")
"""Columns by which a file with the log's columns is recognised."""
NUMBERS = ("time", "chars", "confidence", "label_mass", "num_answer_chars", "seconds")


def write_reference(
    store: ObjectStore, adapter_uri: str, lineage: str, sets: Sequence[TestSet], found: Mapping[str, TaskEvaluation]
) -> None:
    """Write the answers of an evaluation beside the adapter. A task that was measured and not answered is left out.

    A row's id is the digest of the test row; the version is not known yet.
    """
    rows: list[dict[str, Any]] = []
    for test_set in sets:
        evaluation, tests = found[test_set.schema.name], test_set.rows
        if not evaluation.confidences:
            continue
        columns = (tests["sha256"], tests["input"], evaluation.answers, evaluation.confidences, evaluation.outcomes)
        for digest, text, answer, confidence, score in zip(*columns, strict=True):
            facts = answer_facts(test_set.schema, text, answer)
            numbers = {"confidence": confidence.confidence, "label_mass": confidence.label_mass, "score": score}
            rows.append({**facts, **numbers, "id": digest, "lineage": lineage})
    floats = dict.fromkeys(("time", "seconds", "confidence", "label_mass", "score"), "float64")
    texts = dict.fromkeys(("id", "lineage", "version", "task", "input_sha256", "label", "input", "output"), "string")
    frame = pd.DataFrame(rows, columns=[*COLUMNS, "score"]).astype({**floats, "is_label": "boolean", **texts})
    write_frame(store, f"{adapter_uri}/{REFERENCE_FILE}", frame)


def has_reference(store: ObjectStore, adapter_uri: str) -> bool:
    """Whether a version has a reference."""
    return store.exists(f"{adapter_uri}/{REFERENCE_FILE}")


def read_reference(store: ObjectStore, adapter_uri: str) -> pd.DataFrame | None:
    """Read the reference of a version; None: it has none; StoreError: it is damaged."""
    return _read(store, f"{adapter_uri}/{REFERENCE_FILE}") if has_reference(store, adapter_uri) else None


def _read(store: ObjectStore, key: str) -> pd.DataFrame:
    remedy = "Delete it and write it again with deal version evaluate; until then live traffic is not compared."
    return read_frame(store, key, "the reference of a version", remedy)


def read_frame(store: ObjectStore, key: str, what: str, remedy: str) -> pd.DataFrame:
    """Read a table of the store; arguments and errors are those of `reading_stored`."""
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


def forget_reference(store: ObjectStore, key: str, task: str, left: Collection[str]) -> None:
    """Remove a task's rows from a reference, except those with the digests `left`. Can be repeated."""
    frame = _read(store, key)
    staying = frame[(frame["task"] != task) | frame["id"].isin(left)]
    if staying.empty:
        store.delete(key)
    elif len(staying) < len(frame):
        write_frame(store, key, staying)


def holds_others(store: ObjectStore, key: str, task: str, left: Collection[str]) -> bool:
    """Whether a reference has rows of a task with other digests than these."""
    if not store.exists(key):
        return False
    frame = _read(store, key)
    return bool(((frame["task"] == task) & ~frame["id"].isin(left)).any())


def with_texts(store: ObjectStore, record: LineageRecord, reference: pd.DataFrame) -> pd.DataFrame:
    """Return the reference with the texts of the test rows, where the store still has them."""
    texts: dict[str, str] = {}
    for uri in (uri for known in record.tasks for uri in known.test_uris):
        if store.exists(f"{uri}/{TEST_FILE}"):
            rows = read_test_rows(store, uri, ("sha256", "input"))
            texts |= zip(rows["sha256"].to_pylist(), rows["input"].to_pylist(), strict=True)
    return reference.assign(input=reference["id"].map(texts))


def champion_since(store: ObjectStore, lineage: str, version: str) -> float | None:
    """Return when a version became champion the last time, in UTC seconds; None: the log does not say."""
    newest_first = reversed(PromotionLog(store).moves(lineage))
    own = list(takewhile(lambda move: move.champion == version, newest_first))
    return own[-1].when.timestamp() if own else None


def rows_of_file(path: Path, record: LineageRecord, version: str) -> tuple[pd.DataFrame, int]:
    """Read answers of a version from a file: with the columns of the log, or as `deal predict --data` writes it.

    A file of the second kind has a column with the inputs and a column `answer`; `task`, `lineage` and `version` may be
    missing. It has no confidences, so neither these are compared nor is accuracy estimated. A row without a task is of
    the task learned last. Rows without an answer and rows of other versions are left out.

    Returns:
        The answers, and the number of rows that cannot be read. They are left out too.

    Raises:
        ConfigError: The file has neither kind of columns, a task is unknown, or no row is of the version.
        DataValidationError: The file cannot be read.
    """
    columns = list(survey_rows(path).types)
    # name of each column that `deal predict` has added: if the input had the name already, it begins with deal_
    own = {name: f"deal_{name}" if f"deal_{name}" in columns else name for name in OWN_COLUMNS}
    rows = [*read_rows(path)]
    readable = [row for row in rows if row.fault is None]
    if set(OF_LOG) <= set(columns):
        last = choose_task(record, None).schema.name
        values = [{**dict.fromkeys(COLUMNS), **row.values} for row in readable]
        answers = [{**row, "task": last if is_empty(row["task"]) else row["task"]} for row in values]
    elif own["answer"] in columns:
        inputs = [name for name in columns if name not in own.values()]
        answers = [*_answered(path, readable, inputs, own, record)]
    else:
        raise ConfigError(
            f"{path.name} has neither the columns of the prediction log ({', '.join(OF_LOG)}, …) nor a column "
            "'answer'; give a file of deal predict --data, or one with these columns."
        )
    # the columns get their types, as a CSV has texts only
    table = pd.DataFrame(answers, columns=list(COLUMNS)).map(lambda value: None if value == "" else value)
    labelled = [task.schema.name for task in record.tasks if task.schema.labels]
    is_label = table["label"].notna().astype("boolean").where(table["task"].isin(labelled))
    numbers = {name: pd.to_numeric(table[name], errors="coerce") for name in NUMBERS}
    table = table.assign(**numbers, is_label=is_label)
    versions = table["version"].fillna(version).astype(str)
    of_version = table[(versions == version) & table["lineage"].fillna(record.lineage).eq(record.lineage)]
    if of_version.empty:
        others = ", ".join(sorted(set(versions)))
        raise ConfigError(
            f"{path.name} has no answer of version {version} of {record.lineage}"
            + (f", only of version {others}" if others else "")
            + "; give a file that this version has answered."
        )
    return of_version.assign(version=version, lineage=record.lineage), len(rows) - len(readable)


def _answered(
    path: Path, rows: Iterable[RawRow], inputs: Sequence[str], own: Mapping[str, str], record: LineageRecord
) -> Iterator[dict[str, Any]]:
    """Read rows as `deal predict --data` writes them. `inputs` are the columns of the input, `own` the added ones."""
    checkers: dict[str, RowChecker] = {}
    for row in rows:
        answer, name = row.values.get(own["answer"]), row.values.get(own["task"])
        if not isinstance(answer, str):
            continue
        schema = choose_task(record, None if is_empty(name) else str(name)).schema
        if schema.name not in checkers:
            columns = find_input(inputs, schema, path.name)
            checkers[schema.name] = RowChecker(schema, columns, max_text_chars=sys.maxsize)
        (text,) = checkers[schema.name].check_inputs(RowList([row]))
        if isinstance(text, str):
            yield {
                **dict.fromkeys(COLUMNS),
                **answer_facts(schema, text, answer),
                "input": text,
                "output": answer,
                "lineage": row.values.get(own["lineage"]),
                "version": row.values.get(own["version"]),
            }
