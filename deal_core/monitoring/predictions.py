"""A row of the prediction log: one answer that a served version gave."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from deal_core.data.rows import stored_input_digest
from deal_core.data.schema import TaskSchema, label_key

if TYPE_CHECKING:
    from deal_core.evaluation.answerer import Answered
    from deal_core.evaluation.answering import InputRow


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


COLUMNS: tuple[str, ...] = tuple(each.name for each in fields(Prediction))
"""The names of a row's columns, in order."""


def predictions_of(
    rows: Sequence[InputRow], answered: Answered, *, seconds: float, keeps_texts: bool
) -> list[Prediction]:
    """Return the log's rows of one request. Each gets a new id.

    Args:
        rows: The request's rows.
        answered: Their answers.
        seconds: How long the request took.
        keeps_texts: Whether the rows get `input` and `output`.
    """
    found, now = [], time.time()
    given = zip(rows, answered.answers, answered.confidences, strict=True)
    for number, (row, answer, (confidence, label_mass)) in enumerate(given, 1):
        task, text = answered.served.asked(row, number)
        found.append(Prediction(
            id=uuid.uuid4().hex, time=now, lineage=answered.served.lineage, version=answered.version,
            **answer_facts(task.schema, text, answer), confidence=confidence, label_mass=label_mass, seconds=seconds,
            input=text if keeps_texts else None, output=answer if keeps_texts else None,
        ))  # fmt: skip
    return found


def answer_facts(schema: TaskSchema, text: str, answer: str) -> dict[str, Any]:
    """Return the columns of an answer that follow from the task, the normalised input and the answer alone."""
    assert schema.format != "auto", "a task that was learned has a format"
    label = _spelled(schema.labels).get(label_key(answer))
    return {
        "task": schema.name, "input_sha256": stored_input_digest(schema.format, text).hex(), "chars": len(text),
        "label": label, "is_label": label is not None if schema.labels else None, "num_answer_chars": len(answer),
    }  # fmt: skip


@lru_cache(maxsize=256)
def _spelled(labels: tuple[str, ...]) -> dict[str, str]:
    """Each label by its key."""
    return {label_key(each): each for each in labels}
