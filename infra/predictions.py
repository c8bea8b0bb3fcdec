"""Read the prediction log and the feedback of a lineage, and remove rows from them.

All functions that take a store raise StoreError if the store does not answer or a batch is damaged. Those that remove
rows need a caller who holds the lineage.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import UTC, datetime

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from deal_core.data.schema import label_key
from deal_core.monitoring.predictions import ROLLOUT_COLUMNS
from infra.log_batches import Log, read_log, remove_rows
from infra.store.base import ObjectStore
from infra.store.keys import FEEDBACK, PREDICTIONS

PREDICTION_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("time", pa.float64()),
        ("lineage", pa.string()),
        ("version", pa.string()),
        ("task", pa.string()),
        ("input_sha256", pa.string()),
        ("chars", pa.int64()),
        ("label", pa.string()),
        ("is_label", pa.bool_()),
        ("confidence", pa.float64()),
        ("label_mass", pa.float64()),
        ("num_answer_chars", pa.int64()),
        ("seconds", pa.float64()),
        ("input", pa.string()),
        ("output", pa.string()),
        ("shadow_of", pa.string()),
        ("is_failed", pa.bool_()),
    ]
)
"""The columns of `Prediction`, as they are stored."""
FEEDBACK_SCHEMA = pa.schema(
    [
        ("entry", pa.string()),
        ("id", pa.string()),
        ("time", pa.float64()),
        ("label", pa.string()),
        ("is_right", pa.bool_()),
        ("source", pa.string()),
        ("is_random", pa.bool_()),
        ("reviewer", pa.string()),
    ]
)
"""The columns of `Feedback`, as they are stored. An answer may have several entries; `entry` tells them apart."""


def prediction_log(lineage: str) -> Log:
    """Return the prediction log of a lineage."""
    return Log(PREDICTIONS, PREDICTION_SCHEMA, "id", lineage)


def feedback_log(lineage: str) -> Log:
    """Return the feedback of a lineage."""
    return Log(FEEDBACK, FEEDBACK_SCHEMA, "entry", lineage)


def read_predictions(
    store: ObjectStore,
    lineage: str,
    *,
    task: str | None = None,
    version: str | None = None,
    since: float | None = None,
    of_rollout: bool = False,
    columns: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Return logged answers, oldest first, with the columns of `Prediction`. A row counts once.

    `task`, `version` and `since` (seconds since 1970, UTC) leave out other answers. Only a rollout has rows without an
    answer that was returned. They, and their columns, are left out unless `of_rollout` is True. `columns` are read, and
    those that choose rows; None: all. Texts take most of the memory.

    Texts and truth values that are missing are None, missing numbers NaN.
    """
    day = None if since is None else datetime.fromtimestamp(since, UTC).date()  # a row is older than its batch
    wanted = None if columns is None else [*dict.fromkeys([*columns, "time", "task", "version", *ROLLOUT_COLUMNS])]
    rows = read_log(store, prediction_log(lineage), day, columns=wanted)
    for name, value in (("task", task), ("version", version)):  # before texts become Python's, which are much larger
        if value is not None:
            rows = rows.filter(pc.field(name) == value)
    if since is not None:
        rows = rows.filter(pc.field("time") >= since)
    if not of_rollout:
        rows = rows.filter(pc.field("shadow_of").is_null() & pc.field("is_failed").is_null())
        rows = rows.drop_columns([*ROLLOUT_COLUMNS])
    return _frame(rows).sort_values("time", kind="stable", ignore_index=True)


def read_feedback(store: ObjectStore, lineage: str, *, answers: pd.DataFrame | None = None) -> pd.DataFrame:
    """Return the feedback on answers, oldest first, with the columns of `Feedback`. An answer has at most one row.

    Of several entries for one answer, those that a person checked come first, then the newest. An entry with a
    label tells whether the answer was right if the log still has the answer. So does a right answer in the words of a
    task without labels: another answer was wrong. If the chosen entry does not tell it, the newest entry that does
    counts. An answer was chosen at random if one entry says so.
    `answers` are the rows of the log that matter to the caller; None: all are read.
    """
    entries = _frame(read_log(store, feedback_log(lineage))).drop(columns="entry")
    if entries["label"].notna().any():
        if answers is None:
            columns = ["id", "label", "is_label", "output"]
            answers = _frame(read_log(store, prediction_log(lineage), columns=columns))
        answer_of = {
            row.id: row.output if row.is_label is None else row.label if row.is_label else ""
            for row in answers.itertuples()
            if row.is_label is not None or row.output is not None
        }
        is_right = [
            label_key(answer_of[row.id]) == label_key(row.label)
            if row.label is not None and row.id in answer_of
            else row.is_right
            for row in entries.itertuples()
        ]
        entries["is_right"] = pd.Series(is_right, dtype=object)
    # facts that any entry of an answer tells
    chosen = set(entries.loc[entries["is_random"] == True, "id"])  # noqa: E712
    telling = entries[entries["is_right"].notna()].sort_values("time", kind="stable")
    newest = dict(zip(telling["id"], telling["is_right"], strict=True))
    # the entry of each answer that counts
    entries["is_reviewed"] = (entries["source"] == "command") | entries["reviewer"].notna()
    rows = entries.sort_values(["is_reviewed", "time"], kind="stable").drop_duplicates("id", keep="last")
    rows = rows.drop(columns="is_reviewed").sort_values("time", kind="stable", ignore_index=True)
    is_right = [newest.get(row.id) if row.is_right is None else row.is_right for row in rows.itertuples()]
    return rows.assign(
        is_right=pd.Series(is_right, dtype=object), is_random=pd.Series(rows["id"].isin(chosen), dtype=object)
    )


def feedback_ids(store: ObjectStore, lineage: str) -> set[str]:
    """Return the ids of the answers with feedback."""
    return set(read_log(store, feedback_log(lineage), columns=["id"]).column("id").to_pylist())


def answers_to(store: ObjectStore, lineage: str, inputs: Collection[str]) -> set[str]:
    """Return the ids of the logged answers to these inputs, which are named by `input_sha256`."""
    answers = _frame(read_log(store, prediction_log(lineage), columns=["id", "input_sha256"]))
    return set(answers.loc[answers["input_sha256"].isin(inputs), "id"])


def forget_answers(store: ObjectStore, lineage: str, inputs: Collection[str]) -> None:
    """Remove the logged answers to these inputs, and the feedback on the answers. The call can be repeated."""
    ids = answers_to(store, lineage, inputs)
    remove_rows(store, feedback_log(lineage), ids)  # first, because only the answers tell the ids
    remove_rows(store, prediction_log(lineage), ids)


def _frame(table: pa.Table) -> pd.DataFrame:
    """A table for pandas, with None for missing texts and truth values, whatever pandas' own text type is."""
    columns = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        is_number = pa.types.is_floating(column.type) or pa.types.is_integer(column.type)
        columns[name] = column.to_pandas() if is_number else pd.Series(column.to_pylist(), dtype=object)
    return pd.DataFrame(columns)
