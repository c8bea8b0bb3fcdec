"""Choose texts that are worth labelling, from the prediction log or from a file, and write a file to fill in.

The file has the columns of the task, with an empty one for the right answer. It is also a file of feedback: it has the
ids of logged answers, and `is_random`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import BaseModel

from deal_core.data.answer_files import in_chunks, survey_rows
from deal_core.data.columns import find_input
from deal_core.data.reading.csv_records import GUARD_COLUMN, guarded
from deal_core.data.reading.readers import read_batches
from deal_core.data.row_checks import RowChecker
from deal_core.data.rows import stored_input_digest
from deal_core.data.schema import TaskSchema
from deal_core.errors import ConfigError
from deal_core.evaluation.generation import counting
from deal_core.monitoring.feedback import KEYS, RANDOM_SHARE, select_rows
from deal_core.monitoring.predictions import COLUMNS, answer_facts
from deal_core.regular_file import complete_file
from infra.predictions import feedback_ids, read_predictions
from infra.store.base import ObjectStore
from tasks.landed_inputs import task_inputs
from tasks.monitoring.feedback import answer_column, as_landed, has_earlier_answers, input_columns, said_columns
from tasks.predict import CHUNK_ROWS, Asked, OnProgress, answering

CHAMPION_ANSWER = "champion_answer"
"""The column with the champion's answer. Neither ingest nor feedback reads it."""
OWN_COLUMNS = ("id", CHAMPION_ANSWER, "confidence", "is_random", GUARD_COLUMN)


class SelectResult(BaseModel, frozen=True):
    """A file to fill in."""

    lineage: str
    task: str
    version: str
    """The version that answered."""
    out: str
    """Path of the file."""
    column: str
    """The column to fill in."""
    data: str | None
    """The file that the texts come from; None: the prediction log."""
    num_rows: int
    """Texts in the file."""
    num_random: int
    """Those of them that were drawn at random."""
    num_inputs: int
    """Different inputs that were looked at."""
    num_known: int
    """Those of them that have feedback or have landed already."""
    num_unusable: int
    """Rows without a text that can be labelled."""


def select_to_label(
    store: ObjectStore,
    task: str,
    lineage: str,
    *,
    data: Path | None = None,
    column: str | None = None,
    out: Path | None = None,
    number: int = 50,
    random_share: float = RANDOM_SHARE,
    on_progress: OnProgress = lambda done, total: None,
) -> SelectResult:
    """Write a file of texts that are worth labelling: those with the least certain answers, and a random share.

    Texts with feedback are left out, and texts that have landed, as far as the store still has them.

    Args:
        store: The store, which has the lineage.
        task: The task.
        lineage: Its champion has answered.
        data: Texts without labels: CSV, JSON lines or Parquet. The champion answers them. None: the prediction log.
        column: The column of `data` with the texts; None: the task's column, or the conventional one.
        out: A .csv or .jsonl file that does not exist; None: TASK-to-label.csv in the working folder.
        number: Most rows.
        random_share: Share of the rows that is drawn at random.
        on_progress: Called with the number of answered texts of `data` and of all.

    Raises:
        ConfigError: There is nothing to choose from, the file exists, or an argument is not valid.
        DataValidationError: `data` cannot be read.
        RegistryError: The lineage has no champion.
    """
    output = out or Path(f"{task}-to-label.csv")
    if output.suffix not in (".csv", ".jsonl"):
        raise ConfigError(f"The texts would go to {output.name}; give a name that ends in .csv or .jsonl.")
    _require_new(output)
    asked = Asked.find(store, lineage, task, None)
    info, schema = asked.info, as_landed(store, asked.known.schema)
    _check_columns(schema)
    logged = read_predictions(store, lineage, task=task)
    has_feedback = logged["id"].isin(feedback_ids(store, lineage))  # whatever version answered
    known = frozenset(logged.loc[has_feedback, "input_sha256"]) | task_inputs(store, schema)
    if data is None:
        rows, num_unusable = _logged_texts(logged[logged["version"] == info.version], schema, asked)
    else:
        rows, num_unusable = _answered_texts(store, data, column, schema, asked, known, on_progress)
    chosen = select_rows(rows, number, random_share=random_share, known=known)
    inputs = set(rows["input_sha256"])
    if chosen.empty:
        raise ConfigError(
            f"There is no text of '{task}' to label: {len(inputs)} different texts have feedback or have landed "
            f"already, and {num_unusable} rows cannot be labelled."
        )
    _write_new(output, [_to_fill_in(schema, row) for row in chosen.to_dict("records")])
    return SelectResult(
        lineage=lineage,
        task=task,
        version=info.version,
        out=str(output),
        column=answer_column(schema),
        data=None if data is None else str(data),
        num_rows=len(chosen),
        num_random=int(chosen["is_random"].sum()),
        num_inputs=len(inputs),
        num_known=len(inputs & known),
        num_unusable=num_unusable,
    )


def _require_new(output: Path) -> None:
    if output.exists():
        raise ConfigError(f"{output} exists already; move it, or give another --out.")


def _check_columns(schema: TaskSchema) -> None:
    """Refuse a task whose own names of columns have another meaning in the file."""
    answer = answer_column(schema)
    probe = '[{"role": "user", "content": "", "tools": []}]' if schema.format == "chat" else ""
    inputs = set(input_columns(schema, probe))
    doubled = (inputs & {*OWN_COLUMNS, *KEYS, answer}) | ({answer} & {*OWN_COLUMNS, "reviewer"})
    if doubled:
        raise ConfigError(
            f"Task '{schema.name}' calls a column {', '.join(sorted(doubled))}, which means something else in a file "
            "to fill in; give its files another name for the column (task.columns)."
        )


def _logged_texts(logged: pd.DataFrame, schema: TaskSchema, asked: Asked) -> tuple[pd.DataFrame, int]:
    """The rows of the log whose text can be labelled, and the number of the others."""
    rows = logged[logged["input"].notna()]
    if rows.empty:
        what = f"no texts, only {len(logged)} rows of numbers," if len(logged) else "no answers"
        raise ConfigError(
            f"The prediction log has {what} of version {asked.info.version} of '{asked.info.lineage}' to task "
            f"'{schema.name}'. Start deal serve with DEAL_LOG_PREDICTIONS=texts and wait for traffic, or give a file "
            "of texts with --data FILE."
        )
    rows = rows[[not has_earlier_answers(schema, text) for text in rows["input"]]]
    return rows, len(logged) - len(rows)


def _answered_texts(
    store: ObjectStore,
    data: Path,
    column: str | None,
    schema: TaskSchema,
    asked: Asked,
    known: frozenset[str],
    on_progress: OnProgress,
) -> tuple[pd.DataFrame, int]:
    """The different texts of a file as rows of the log, and the number of rows without one.

    The champion does not answer texts that are known. They have no confidence.
    """
    if schema.format == "chat":
        raise ConfigError(
            f"Task '{schema.name}' has chats, and a table of chats has no column for the right answer. Let deal serve "
            "answer them with DEAL_LOG_PREDICTIONS=texts, then select without --data."
        )
    if schema.learns_preferences:
        raise ConfigError(
            f"Task '{schema.name}' learns preferences, so a row needs two answers, and this file has one column for "
            "them. Let deal serve answer the texts with DEAL_LOG_PREDICTIONS=texts, then select without --data."
        )
    checker = RowChecker(schema, find_input([*survey_rows(data).types], schema, data.name, column), sys.maxsize)
    texts: dict[str, str] = {}
    num_unusable = 0
    assert schema.format != "auto", "a task that was learned has a format"
    for batch in read_batches(data):
        for text in checker.check_inputs(batch):
            if isinstance(text, str):
                texts.setdefault(stored_input_digest(schema.format, text).hex(), text)
            else:
                num_unusable += 1
    rows: list[dict[str, Any]] = [{"input_sha256": key, "input": texts[key]} for key in texts if key in known]
    new = [text for digest, text in texts.items() if digest not in known]
    if new:
        on_rows = counting(on_progress, len(new))
        answer = answering(store, asked)
        answers = [given for chunk in in_chunks(new, CHUNK_ROWS) for given in answer(chunk, on_rows)]
        for text, given in zip(new, answers, strict=True):
            facts = answer_facts(asked.known.schema, text, given.text)
            rows.append({**facts, "input": text, "output": given.text, "confidence": given.confidence.confidence})
    return pd.DataFrame(rows, columns=[*COLUMNS]), num_unusable


def _to_fill_in(schema: TaskSchema, row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": row["id"] if isinstance(row["id"], str) else "",
        **input_columns(schema, row["input"]),
        answer_column(schema): "",
        CHAMPION_ANSWER: row["output"],
        "confidence": round(row["confidence"], 4),
        "is_random": bool(row["is_random"]),
        **said_columns(schema),
    }


def _write_new(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a file that does not exist, completely or not at all. No cell of a CSV runs as a formula."""
    _require_new(path)
    with complete_file(path) as part:
        if path.suffix == ".jsonl":
            part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
            return
        texts = [
            {
                name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
                for name, value in row.items()
            }
            for row in rows
        ]
        # with these line ends, a lone CR in a text is quoted
        pd.DataFrame(guarded(texts)).to_csv(part, index=False, encoding="utf-8-sig", lineterminator="\r\n")
