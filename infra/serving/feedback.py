"""The body of POST /feedback."""

from __future__ import annotations

import time
from typing import Any

from deal_core.errors import ConfigError
from deal_core.evaluation.answering import ServedVersion
from deal_core.monitoring.feedback import read_entry
from infra.serving.prediction_log import PredictionLog
from infra.serving.refusal import RefusalError

MAX_ENTRIES = 1000
FEEDBACK_BODY = '[{"id": ID, "label": LABEL}]'


def take_feedback(log: PredictionLog | None, served: ServedVersion, values: Any) -> int:
    """Log feedback; return the number of entries. A wrong entry refuses all of them.

    Raises:
        RefusalError: 400: an entry is wrong. 409: the log is off. 503: there is no room now.
    """
    if log is None:
        raise RefusalError(409, "The prediction log is off; start deal serve with DEAL_LOG_PREDICTIONS.")
    if not isinstance(values, list) or not values or len(values) > MAX_ENTRIES:
        raise RefusalError(400, f"The body is no list of 1 to {MAX_ENTRIES} entries; send {FEEDBACK_BODY}.")
    tasks = {task.schema.name: task.schema for task in served.tasks}
    now, found = time.time(), []
    try:
        for number, entry in enumerate(values, 1):
            place = f"Entry {number}"
            read = read_entry(entry, place, source="api", now=now)
            read.check_texts(log.keeps_texts, place)
            found.append(read.check_against(tasks, log.task_of(read.feedback.id), place))
    except ConfigError as error:
        raise RefusalError(400, str(error)) from None
    if not log.take_feedback(found):
        raise RefusalError(503, "The log has no room; send the same feedback again in a moment.", {"Retry-After": "2"})
    return len(found)
