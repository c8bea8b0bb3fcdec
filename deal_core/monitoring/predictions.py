"""A row of the prediction log: one answer that a served version gave."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from deal_core.data.rows import stored_input_digest
from deal_core.data.schema import TaskSchema, label_key

if TYPE_CHECKING:
    from deal_core.evaluation.answerer import Answered
    from deal_core.evaluation.answering import InputRow, ServedTask, ServedVersion


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One answer. Without `input` and `output` it holds no text of the request, but the digest may be guessed."""

    id: str
    """32 hexadecimal digits; each answer has its own. Feedback names it."""
    time: float
    """When the answer was given, in seconds since 1970 (UTC)."""
    lineage: str
    version: str
    task: str
    """The task that was asked, also if the request named none."""
    input_sha256: str
    """Digest of the normalised input, as datasets have it (`stored_input_digest`)."""
    chars: int
    """Length of the normalised input."""
    label: str | None
    """The answer, if it is one of the task's labels."""
    is_label: bool | None
    """Whether the answer is one of the task's labels; None: the task has none."""
    confidence: float
    """See `Confidence`."""
    label_mass: float | None
    """See `Confidence`."""
    num_answer_chars: int
    seconds: float
    """How long the request with the row waited for its answers."""
    input: str | None = None
    """The normalised input; None: the log keeps no texts."""
    output: str | None = None
    """The answer; None: the log keeps no texts."""
    shadow_of: str | None = None
    """The id of the answer that was returned, if this one was not: a version in rollout answered a copy of the row.
    None: this answer was returned."""
    is_failed: bool | None = None
    """True: the version failed on the row during a rollout, so there is no answer. None: there is one."""


ROLLOUT_COLUMNS = ("shadow_of", "is_failed")
"""Columns that have values only in rows of a rollout."""
COLUMNS: tuple[str, ...] = tuple(field.name for field in fields(Prediction) if field.name not in ROLLOUT_COLUMNS)
"""The names of the columns of an answer that was returned, in order."""


def predictions_of(
    rows: Sequence[InputRow],
    answered: Answered,
    *,
    seconds: float,
    keeps_texts: bool,
    shadow_of: Sequence[str] = (),
    ids: Sequence[str] = (),
) -> list[Prediction]:
    """Return the log's rows of one request, which took so many seconds. `ids` are theirs; empty: they get new ones.

    With `keeps_texts` the rows get `input` and `output`. `shadow_of` has the ids of the answers that were returned
    instead; it is empty if these answers were returned.
    """
    of_rows = _of_rows(rows, answered.served, answered.version, seconds, shadow_of)
    return [
        Prediction(
            id=own_id,
            **common,
            **answer_facts(task.schema, text, answer),
            confidence=confidence,
            label_mass=label_mass,
            input=text if keeps_texts else None,
            output=answer if keeps_texts else None,
        )
        for (task, text, common), answer, (confidence, label_mass), own_id in zip(
            of_rows, answered.answers, answered.confidences, ids or [uuid.uuid4().hex for _ in rows], strict=True
        )
    ]


def failures_of(
    rows: Sequence[InputRow], served: ServedVersion, version: str, *, seconds: float, shadow_of: Sequence[str] = ()
) -> list[Prediction]:
    """Return the log's rows of a request on which a version in rollout, or its champion, failed. They have no texts.

    `version` failed; the rows fit the version `served`. The other arguments are those of `predictions_of`.
    """
    return [
        Prediction(
            id=uuid.uuid4().hex,
            **common,
            **{**answer_facts(task.schema, text, ""), "label": None, "is_label": None},
            confidence=0.0,
            label_mass=None,
            is_failed=True,
        )
        for task, text, common in _of_rows(rows, served, version, seconds, shadow_of)
    ]


def _of_rows(
    rows: Sequence[InputRow], served: ServedVersion, version: str, seconds: float, shadow_of: Sequence[str]
) -> Iterator[tuple[ServedTask, str, dict[str, Any]]]:
    """For each row its task, its normalised input, and the columns that all rows of a request share."""
    common = {"time": time.time(), "lineage": served.lineage, "version": version, "seconds": seconds}
    for number, row in enumerate(rows, 1):
        yield *served.task_and_input(row, number), {**common, "shadow_of": shadow_of[number - 1] if shadow_of else None}


def answer_facts(schema: TaskSchema, text: str, answer: str) -> dict[str, Any]:
    """Return the columns of an answer that follow from the task, the normalised input and the answer alone."""
    assert schema.format != "auto", "a task that was learned has a format"
    label = _spelled(schema.labels).get(label_key(answer))
    return {
        "task": schema.name,
        "input_sha256": stored_input_digest(schema.format, text).hex(),
        "chars": len(text),
        "label": label,
        "is_label": label is not None if schema.labels else None,
        "num_answer_chars": len(answer),
    }


@lru_cache(maxsize=256)
def _spelled(labels: tuple[str, ...]) -> dict[str, str]:
    """Each label by its key."""
    return {label_key(label): label for label in labels}
