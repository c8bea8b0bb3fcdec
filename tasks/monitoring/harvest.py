"""Harvest: reviewed right answers become an ordinary file in the inbox. Each is harvested once.

A row is harvested if a person checked its right answer and the prediction log has its text. What the model
answered is never learned; a task that learns preferences learns to prefer the right answer to it.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Set
from contextlib import AbstractContextManager, suppress
from datetime import UTC, datetime
from typing import Any

import pandas as pd
from pydantic import BaseModel

from deal_core.data.rows import row_digest
from deal_core.data.schema import TaskSchema, label_key
from deal_core.errors import ConfigError
from infra.predictions import read_feedback, read_predictions
from infra.settings import HomeSettings
from infra.store import keys
from infra.store.base import ObjectStore
from infra.store.keys import INBOX, harvest_key, inbox_folder
from infra.store.stored import Stored, read_stored, write_stored
from tasks.context import only_process
from tasks.monitoring.feedback import as_landed, has_earlier_answers, row_columns, task_schemas

FILE_PREFIX = "feedback-"
"""Begins the name of a harvested file."""
NOT_IN_LOG = "the log does not have the answer"
NO_TEXT = "the log keeps no texts (DEAL_LOG_PREDICTIONS=texts)"
NO_LABEL = "the task does not have the label any more"
NOT_REVIEWED = "no reviewer is named"
EARLIER_TURNS = "the chat has earlier answers, which would be learned unreviewed (assistant_turns: last)"
KNOWN = "harvested before"
NOTHING_TO_PREFER = "the answer was right, and a preference needs a worse one"


class Pending(BaseModel, extra="forbid"):
    """A file that was about to be written."""

    key: str
    rows: tuple[str, ...]


class Harvested(Stored):
    """The rows of a task that were harvested, by digest."""

    rows: tuple[str, ...] = ()
    pending: Pending | None = None


class HarvestResult(BaseModel, frozen=True):
    """What was harvested."""

    lineage: str
    task: str
    key: str | None
    """The file in the inbox; None: there was nothing to harvest."""
    num_rows: int
    """Rows that landed."""
    skipped: dict[str, int]
    """Feedback with a right answer that was not harvested, by the reason."""


def harvest_feedback(store: ObjectStore, task: str, lineage: str) -> HarvestResult:
    """Write the reviewed right answers to a task's logged texts into the task's inbox.

    The file has the columns of the task, and the origin of each row: `answer_id`, `answered_by`, `answered_at`,
    `reviewed_by` and `reviewed_at`, which ingest does not read, and `is_random`. Of several answers to one text, the
    newest counts.

    Raises:
        ConfigError: The lineage does not know the task, or another process harvests it.
        RegistryError: The lineage has no champion.
        StoreError: The store does not answer, or the note of what was harvested is damaged.
    """
    schemas = task_schemas(store, lineage)
    if task not in schemas:
        raise ConfigError(f"Lineage '{lineage}' knows no task '{task}'; it knows {', '.join(schemas)}.")
    with _alone(lineage, task):
        remedy = "Restore it; if it is deleted, the feedback that is still in the log lands again."
        note = harvest_key(lineage, task)
        stored = read_stored(store, note, Harvested, what="the note of harvested feedback", remedy=remedy)
        done = stored.rows if stored is not None else ()
        # the process before may have died before or after it wrote the file
        if stored is not None and stored.pending is not None and store.exists(stored.pending.key):
            done += stored.pending.rows
        logged = read_predictions(store, lineage)
        feedback = read_feedback(store, lineage, answers=logged)
        skipped: Counter[str] = Counter()
        rows = _choose(feedback, logged, as_landed(store, schemas[task]), skipped)
        if known := rows.keys() & {*done}:
            skipped[KNOWN] += len(known)
            rows = {digest: values for digest, values in rows.items() if digest not in known}
        key = None
        if rows:  # noted before and after, so that a crash in between loses no row and lands none twice
            content = "".join(json.dumps(values, ensure_ascii=False) + "\n" for values in rows.values()).encode()
            key = f"{inbox_folder(task)}/{FILE_PREFIX}{hashlib.sha256(content).hexdigest()[:16]}.jsonl"
            write_stored(store, note, Harvested(rows=done, pending=Pending(key=key, rows=tuple(rows))))
            store.put_bytes(key, content, if_absent=True)
            write_stored(store, note, Harvested(rows=(*done, *rows)))
    return HarvestResult(lineage=lineage, task=task, key=key, num_rows=len(rows), skipped=dict(skipped))


def harvested_from(store: ObjectStore, answer_ids: Set[str]) -> list[str]:
    """Return the keys of the harvested files in the inbox with a row that comes from one of these logged answers."""
    if not answer_ids:
        return []
    return [
        info.key
        for info in store.list(INBOX)
        if keys.arrival_of(info.key) == info.key
        and keys.file_name(info.key).startswith(FILE_PREFIX)
        and not answer_ids.isdisjoint(_answer_ids(store.get_bytes(info.key)))
    ]


def _answer_ids(content: bytes) -> Iterator[str]:
    """The ids of the answers that the rows of a harvested file come from. A file of another origin has none."""
    for line in content.splitlines():
        with suppress(ValueError):
            values = json.loads(line)
            if isinstance(values, dict) and isinstance(values.get("answer_id"), str):
                yield values["answer_id"]


def _choose(
    feedback: pd.DataFrame, logged: pd.DataFrame, schema: TaskSchema, skipped: Counter[str]
) -> dict[str, dict[str, Any]]:
    """Return the rows to harvest by digest, the newest of each text, in the order of their feedback."""
    answers = {row["id"]: row for row in logged.to_dict("records")}
    newest: dict[str, tuple[str, dict[str, Any]]] = {}
    for entry in feedback.to_dict("records"):
        answer = answers.get(entry["id"])
        right = entry["label"]
        if right is None or (answer is not None and answer["task"] != schema.name):
            continue
        reason = NOT_IN_LOG if answer is None else _problem(entry, answer, schema)
        if answer is None or reason:
            skipped[reason] += 1
            continue
        input_sha256 = answer["input_sha256"]
        newest.pop(input_sha256, None)
        values = row_columns(schema, answer["input"], right, answer["output"]) | {
            "answer_id": answer["id"],
            "answered_by": f"{answer['lineage']}@{answer['version']}",
            "answered_at": _time(answer["time"]),
            "reviewed_by": entry["reviewer"] or entry["source"],
            "reviewed_at": _time(entry["time"]),
            "is_random": bool(entry["is_random"]),
        }
        digest = row_digest(input_sha256, label_key(right) if schema.labels else right).hex()
        newest[input_sha256] = digest, values
    return dict(newest.values())


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _problem(entry: Mapping[str, Any], answer: Mapping[str, Any], schema: TaskSchema) -> str:
    """Why a right answer is not harvested; empty: it is."""
    if entry["source"] != "command" and entry["reviewer"] is None:
        return NOT_REVIEWED
    if answer["input"] is None:
        return NO_TEXT
    if schema.labels and label_key(entry["label"]) not in {label_key(label) for label in schema.labels}:
        return NO_LABEL
    if schema.learns_preferences and entry["label"].strip() == answer["output"].strip():
        return NOTHING_TO_PREFER
    return EARLIER_TURNS if has_earlier_answers(schema, answer["input"]) else ""


def _alone(lineage: str, task: str) -> AbstractContextManager[None]:
    """Keep other processes of this home from the same harvest."""
    lock = HomeSettings().home / "locks" / "harvest" / lineage / f"{task}.lock"
    return only_process(lock, f"Another process harvests the feedback on {task}; wait for its end.")
