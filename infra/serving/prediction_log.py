"""The prediction log of `deal serve`. It never slows or fails an answer.

Rows wait in memory for a thread, which stores them as one batch every few seconds, and when the server ends. A server
that is killed loses the rows that wait. While the store does not take them, they wait on; rows without room are dropped
and counted. Feedback does not wait: it is stored before its request is answered.

A row whose input was deleted is stored without its texts. That is looked up just before each batch is stored.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

from deal_core.errors import DealError, StoreError
from deal_core.evaluation.answerer import Answered
from deal_core.evaluation.answering import InputRow, ServedVersion
from deal_core.monitoring.feedback import Feedback
from deal_core.monitoring.predictions import Prediction, failures_of, predictions_of
from infra.deleted_inputs import DeletedInputs
from infra.log_batches import BATCH_SECONDS, beyond_retention, put_rows
from infra.predictions import feedback_log, prediction_log
from infra.settings import ServingSettings
from infra.store.base import ObjectStore

MAX_WAITING = 10_000
"""Rows that wait for the store; further rows are dropped. The tasks of as many answers are remembered for feedback."""
MAX_STORING = 8
"""Requests with feedback that are stored at once. If the store hangs, they must not take all places from the others."""
CLEAN_SECONDS = 3600.0
"""Time between two looks for batches that are older than the retention."""
JOIN_SECONDS = 5.0

LOG = logging.getLogger("deal.serving")


class PredictionLog:
    """The log of one server. `start` starts its thread, `close` stores what waits and ends it."""

    def __init__(self, store: ObjectStore, lineage: str, *, keeps_texts: bool, retention_days: int) -> None:
        self.keeps_texts = keeps_texts
        self._retention_days = retention_days
        self._store = store
        self._predictions, self._feedback = prediction_log(lineage), feedback_log(lineage)
        self._deleted = DeletedInputs(store)
        self._tasks: OrderedDict[str, str] = OrderedDict()
        self._waiting: list[dict[str, Any]] = []
        self._changing = threading.Lock()
        self._storing = threading.BoundedSemaphore(MAX_STORING)
        self.threads = ThreadPoolExecutor(MAX_STORING + 1, thread_name_prefix="feedback")
        """Threads for `take_feedback`, with one to refuse what has no place."""
        self.num_dropped = 0
        """Rows that were lost since the server started."""
        self._cleaned = -CLEAN_SECONDS
        self._is_failing = False
        self._due = threading.Event()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prediction-log", daemon=True)

    def start(self) -> None:
        """Start to store rows, and to remove what is older than the retention."""
        self._thread.start()

    def close(self) -> None:
        """Store the rows that wait if the store answers at once, and end within seconds."""
        self._ended.set()
        self._due.set()
        if self._thread.is_alive():
            self._thread.join(JOIN_SECONDS)
        if num_lost := len(self._waiting):
            LOG.warning("%d answers are missing in the prediction log: the store did not take them in time.", num_lost)

    def note(
        self,
        rows: Sequence[InputRow],
        answered: Answered,
        seconds: float,
        shadow_of: Sequence[str] = (),
        *,
        ids: Sequence[str] = (),
    ) -> Answered:
        """Log the answers to a request; return them with the ids of their rows. No error reaches the caller.

        `shadow_of` are the ids of the answers that were returned instead of these. `ids` are those that the client has
        got already, with the first piece of a stream; empty: the rows get new ones.
        """
        try:
            made = predictions_of(
                rows, answered, seconds=seconds, keeps_texts=self.keeps_texts, shadow_of=shadow_of, ids=ids
            )
        except Exception:
            LOG.exception("Answers were not logged")
            with self._changing:
                self.num_dropped += len(rows)
            return answered
        if not shadow_of:  # no client knows the ids of the others
            with self._changing:
                self._tasks.update((row.id, row.task) for row in made)
                while len(self._tasks) > MAX_WAITING:
                    self._tasks.popitem(last=False)
        self._keep(made)
        return answered._replace(ids=[row.id for row in made])

    def note_failure(
        self,
        rows: Sequence[InputRow],
        served: ServedVersion,
        version: str,
        seconds: float,
        shadow_of: Sequence[str] = (),
    ) -> None:
        """Log that a version failed on a request. The rows fit `served`. No error reaches the caller."""
        try:
            self._keep(failures_of(rows, served, version, seconds=seconds, shadow_of=shadow_of))
        except Exception:
            LOG.exception("A failure was not logged")

    def _keep(self, made: Sequence[Prediction]) -> None:
        with self._changing:
            room = MAX_WAITING - len(self._waiting)
            self._waiting += [vars(row) for row in made[:room]]
            self.num_dropped += len(made[room:])
            is_filling = len(self._waiting) > MAX_WAITING // 2
        if is_filling and not self._is_failing:
            self._due.set()

    def take_feedback(self, entries: Sequence[Feedback]) -> bool:
        """Store feedback. False: the store does not take it now, so all of it has to be sent again."""
        if not self._storing.acquire(blocking=False):
            return False
        try:
            put_rows(self._store, self._feedback, [{"entry": uuid.uuid4().hex, **vars(entry)} for entry in entries])
        except StoreError as error:
            LOG.warning("Feedback was not stored: %s", error)
            return False
        finally:
            self._storing.release()
        return True

    def task_of(self, answer_id: str) -> str | None:
        """Return the task of an answer; None: it was given by another server, or long ago."""
        with self._changing:
            return self._tasks.get(answer_id)

    def _run(self) -> None:
        told = set[str]()
        """The steps that failed the last time. The first of several errors is logged."""
        is_last = False
        while not is_last:
            self._due.wait(BATCH_SECONDS)
            self._due.clear()
            is_last = self._ended.is_set()
            failed = set[str]()
            for step in (self._store_rows, self._remove_old):
                try:
                    step()
                except Exception as error:  # the thread must not end
                    failed.add(step.__name__)
                    if step.__name__ not in told:
                        defect = None if isinstance(error, DealError) else error
                        LOG.warning("The prediction log: %s", error, exc_info=defect)
            told = failed

    def _store_rows(self) -> None:
        """Store the rows that wait."""
        with self._changing:
            rows = self._waiting[:]
        if not rows:
            return
        try:
            kept = self._deleted.without_texts(rows) if self.keeps_texts else rows
            put_rows(self._store, self._predictions, kept)
        except StoreError:  # the rows wait on
            self._is_failing = True
            raise
        except Exception:  # another attempt would fail too
            LOG.exception("Answers were not logged")
            with self._changing:
                self.num_dropped += len(rows)
        self._is_failing = False
        with self._changing:
            del self._waiting[: len(rows)]

    def _remove_old(self) -> None:
        """Remove the batches that are older than the retention, once an hour."""
        if self._ended.is_set() or time.monotonic() - self._cleaned < CLEAN_SECONDS:
            return
        for log in (self._predictions, self._feedback):
            for info in beyond_retention(self._store, log, now=datetime.now(UTC), days=self._retention_days):
                self._store.delete(info.key)
        self._cleaned = time.monotonic()


def open_prediction_log(store: ObjectStore, lineage: str) -> PredictionLog | None:
    """Return the log that the settings ask for, not started yet; None: DEAL_LOG_PREDICTIONS is off."""
    serving = ServingSettings()
    if serving.log_predictions == "off":
        return None
    texts, days = serving.log_predictions == "texts", serving.log_retention_days
    return PredictionLog(store, lineage, keeps_texts=texts, retention_days=days)
