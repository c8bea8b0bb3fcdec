"""Made-up rows of a prediction log, for the tests of monitoring."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from infra.predictions import FEEDBACK_SCHEMA, PREDICTION_SCHEMA
from infra.store.base import ObjectStore

SHARES = {"lost card": 0.4, "fee dispute": 0.3, "loan": 0.2, "fraud": 0.1}
WORDS = ("card", "bank", "fee", "loan", "lost", "money", "account", "wrong", "charge", "help")
OTHER_WORDS = ("match", "goal", "team", "league", "coach", "win", "season", "score", "player", "cup")


def logged_rows(
    num_rows: int,
    seed: int,
    *,
    task: str = "bank",
    version: str = "1",
    shares: Mapping[str | None, float] = SHARES,
    sureness: tuple[float, float] = (6.0, 2.0),
    words: Sequence[str] | None = None,
    **columns: Any,
) -> pd.DataFrame:
    """Draw rows of a labelled task, one a minute. A row is right with the probability of its confidence.

    Args:
        num_rows: Number of rows.
        seed: Of the draw.
        task: Name of the task.
        version: The version that answered.
        shares: Label → its share; None: no label.
        sureness: The two parameters of the confidences' Beta distribution.
        words: The texts' words; None: no texts are kept.
        columns: Values in place of the drawn ones.
    """
    random = np.random.default_rng(seed)
    labels = random.choice(np.array([*shares], dtype=object), num_rows, p=[*shares.values()])
    confidence = random.beta(*sureness, num_rows)
    texts = None if words is None else [" ".join(random.choice(words, 12)) for _ in range(num_rows)]
    return pd.DataFrame(
        {
            "id": [f"{task}-{seed}-{number}" for number in range(num_rows)],
            "time": 60.0 * np.arange(num_rows),
            "lineage": "support",
            "version": version,
            "task": task,
            "input_sha256": [f"{task}-{seed}-{number}" for number in range(num_rows)],
            "chars": random.poisson(80, num_rows),
            "label": labels,
            "is_label": [label is not None for label in labels],
            "confidence": confidence,
            "label_mass": random.beta(9, 1, num_rows),
            "num_answer_chars": [len(label or "something else") for label in labels],
            "seconds": 0.1,
            "input": texts,
            "output": None,
            "score": (random.random(num_rows) < confidence).astype(float),
            **columns,
        }
    )


def free_rows(num_rows: int, seed: int, *, answer_chars: float = 40.0, **columns: Any) -> pd.DataFrame:
    """Draw rows of a task with free answers, whose scores are graded."""
    random = np.random.default_rng(seed)
    return logged_rows(
        num_rows,
        seed,
        task="notes",
        **{
            "label": None,
            "is_label": None,
            "label_mass": np.nan,
            "score": random.random(num_rows),
            "num_answer_chars": random.poisson(answer_chars, num_rows),
            **columns,
        },
    )


def feedback_on(
    rows: pd.DataFrame, is_right: Sequence[bool], *, is_random: bool = True, time: float = 0.0
) -> pd.DataFrame:
    """Feedback on the first rows."""
    return pd.DataFrame(
        {
            "id": rows["id"].iloc[: len(is_right)].to_numpy(),
            "time": time,
            "label": None,
            "is_right": [*is_right],
            "source": "test",
            "is_random": is_random,
            "reviewer": None,
        }
    )


def put_predictions(store: ObjectStore, lineage: str, rows: pd.DataFrame, batch: str) -> None:
    """Put rows into the prediction log as a batch."""
    _put(store, f"predictions/{lineage}", rows, PREDICTION_SCHEMA, batch)


def put_feedback(store: ObjectStore, lineage: str, rows: pd.DataFrame, batch: str) -> None:
    """Put feedback into its log."""
    entries = [f"{batch}-{number}" for number in range(len(rows))]
    _put(store, f"feedback/{lineage}", rows.assign(entry=entries), FEEDBACK_SCHEMA, batch)


def _put(store: ObjectStore, folder: str, rows: pd.DataFrame, schema: pa.Schema, batch: str) -> None:
    content, now = io.BytesIO(), datetime.now(UTC)
    columns = rows.reindex(columns=schema.names)  # rows of a rollout have more columns
    values = {name: [None if pd.isna(value) else value for value in columns[name]] for name in schema.names}
    pq.write_table(pa.table(values, schema=schema), content)
    store.put_bytes(f"{folder}/{now:%Y-%m-%d}/{now:%Y%m%dT%H%M%S}-{batch}.parquet", content.getvalue())
