"""The prediction log of `deal serve`. It never slows or fails a request.

Rows go through a bounded queue to one thread, which writes them to the disk twice a second. If the queue is full, or
the disk is, rows are dropped and counted. Another thread moves segments into the object store, and removes those that
are older than the retention.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import Empty, Full, Queue
from typing import Any, NamedTuple

from deal_core.errors import DealError, StoreError
from deal_core.evaluation.answerer import Answered
from deal_core.evaluation.answering import InputRow, ServedVersion
from deal_core.monitoring.feedback import Feedback
from deal_core.monitoring.predictions import Prediction, failures_of, predictions_of
from infra.log_segments import WRITE_SECONDS, SegmentWriter, remove_beyond_retention, ship
from infra.predictions import feedback_log, prediction_log
from infra.serving.answer_ids import AnswerIds
from infra.settings import ServingSettings, StoreSettings
from infra.store.base import ObjectStore
from infra.store.local import open_store

MAX_QUEUED = 10_000
"""Rows that wait for the disk; further rows are dropped. The tasks of as many answers are remembered for feedback, and
of as many answers, how many entries of feedback they got."""
MAX_ENTRIES_OF_ANSWER = 20
"""Entries of feedback on one answer that a server takes."""
SHIP_SECONDS = 5.0
CLEAN_SECONDS = 3600.0
"""Time between two looks for segments that are older than the retention."""
JOIN_SECONDS = 2.0

LOG = logging.getLogger("deal.serving")


class _Waiting(NamedTuple):
    """A row that waits for the disk."""

    is_feedback: bool
    values: dict[str, Any]


class PredictionLog:
    """The log of one server. `start` starts its threads, `close` writes what waits and ends them."""

    def __init__(self, store: ObjectStore, home: Path, lineage: str, *, keeps_texts: bool, retention_days: int) -> None:
        self.keeps_texts = keeps_texts
        self._retention_days = retention_days
        self._store = store
        self._logs = (prediction_log(home, lineage), feedback_log(home, lineage))
        self._queue: Queue[_Waiting] = Queue(MAX_QUEUED)
        self._ids = AnswerIds(store, lineage)
        self._tasks: OrderedDict[str, str] = OrderedDict()
        self._num_entries: OrderedDict[str, int] = OrderedDict()
        """Answer → its entries of feedback."""
        self._changing = threading.Lock()
        self.num_dropped = 0
        """Rows that were lost since the server started."""
        self._ended = threading.Event()
        self._writer = threading.Thread(target=self._write, name="prediction-log", daemon=True)
        self._shipper = threading.Thread(target=self._ship, name="prediction-log-shipper", daemon=True)

    def start(self) -> None:
        """Start to write, to ship what earlier servers left, and to remove what is older than the retention."""
        with suppress(StoreError):  # a server can start while the store is away; the shipper tries again
            self._ids.share()
        self._writer.start()
        self._shipper.start()

    def close(self) -> None:
        """Write the rows that wait, move them into the store if it answers at once, and end within seconds."""
        self._ended.set()
        for thread in (self._writer, self._shipper):
            if thread.is_alive():
                thread.join(JOIN_SECONDS)

    def note(
        self, rows: Sequence[InputRow], answered: Answered, seconds: float, shadow_of: Sequence[str] = ()
    ) -> Answered:
        """Log the answers to a request; return them with the ids of their rows. No error reaches the caller.

        `shadow_of` are the ids of the answers that were returned instead of these.
        """
        try:
            made = predictions_of(
                rows,
                answered,
                new_id=self._ids.new,
                seconds=seconds,
                keeps_texts=self.keeps_texts,
                shadow_of=shadow_of,
            )
        except Exception:
            LOG.exception("Answers were not logged")
            self._drop(len(rows))
            return answered
        if not shadow_of:  # no client knows the ids of the others
            self._remember(made)
        self._keep(made)
        return answered._replace(ids=[each.id for each in made])

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

    def _remember(self, made: Sequence[Prediction]) -> None:
        with self._changing:
            self._tasks.update((each.id, each.task) for each in made)
            _forget_oldest(self._tasks)

    def _keep(self, made: Sequence[Prediction]) -> None:
        self._drop(len(made) - self._put(_Waiting(False, vars(each)) for each in made))

    def take_feedback(self, entries: Sequence[Feedback]) -> bool:
        """Log feedback. False: there is no room for all of it now, so all of it has to be sent again.

        What had room is logged then, and once more after the second attempt.
        """
        rows = [_Waiting(True, {"entry": uuid.uuid4().hex, **vars(each)}) for each in entries]
        is_taken = self._put(rows) == len(rows)
        with self._changing:
            for answer_id, number in Counter(each.id for each in entries).items():
                self._num_entries[answer_id] = self._num_entries.pop(answer_id, 0) + number
            _forget_oldest(self._num_entries)
        return is_taken

    def refusal_of(self, answer_ids: Sequence[str]) -> tuple[int, str] | None:
        """Return why feedback on these answers is not taken: the number of the entry, and a clause; None: it is.

        Without this, feedback would have no bound: each entry is kept, and ids cost a client nothing.
        """
        with self._changing:
            numbers = {answer_id: self._num_entries.get(answer_id, 0) for answer_id in answer_ids}
        for entry, answer_id in enumerate(answer_ids, 1):
            if not self._ids.is_given(answer_id):
                return entry, "names an id that no server of this lineage has given"
            numbers[answer_id] += 1
            if numbers[answer_id] > MAX_ENTRIES_OF_ANSWER:
                return entry, f"is about an answer that has {MAX_ENTRIES_OF_ANSWER} entries already"
        return None

    def task_of(self, answer_id: str) -> str | None:
        """Return the task of an answer; None: it was given by another server, or long ago."""
        with self._changing:
            return self._tasks.get(answer_id)

    def _put(self, rows: Iterable[_Waiting]) -> int:
        """Queue rows until there is no room; return their number."""
        number = 0
        with suppress(Full):
            for row in rows:
                self._queue.put_nowait(row)
                number += 1
        return number

    def _drop(self, number: int) -> None:
        with self._changing:
            self.num_dropped += number

    def _write(self) -> None:
        writers = [SegmentWriter(log) for log in self._logs]
        is_last = False
        while not is_last:
            is_last = self._ended.wait(WRITE_SECONDS)
            rows = self._waiting()
            for is_feedback, writer in enumerate(writers):
                own = [row.values for row in rows if row.is_feedback == is_feedback]
                try:
                    if own:
                        self._drop(writer.write(own))
                except Exception:  # the thread must not end
                    LOG.exception("The prediction log failed")
                    self._drop(len(own))

    def _waiting(self) -> list[_Waiting]:
        found: list[_Waiting] = []
        with suppress(Empty):
            while len(found) < MAX_QUEUED:
                found.append(self._queue.get_nowait())
        return found

    def _ship(self) -> None:
        told, cleaned = set[str](), -CLEAN_SECONDS
        is_last = False
        while not is_last:
            if is_last := self._ended.is_set():
                self._writer.join()
            with suppress(StoreError):  # `ship` has the same error to tell
                self._ids.share()
            errors = _errors_of(partial(ship, self._store, log, everything=is_last) for log in self._logs)
            if not is_last and time.monotonic() - cleaned >= CLEAN_SECONDS:
                remove = partial(remove_beyond_retention, self._store, days=self._retention_days)
                unremoved = _errors_of(partial(remove, log) for log in self._logs)
                errors += unremoved
                cleaned = cleaned if unremoved else time.monotonic()
            for error in errors:
                if str(error) not in told:
                    LOG.warning(
                        "Segments of the prediction log were not moved or removed: %s",
                        error,
                        exc_info=None if isinstance(error, DealError | OSError) else error,
                    )
            told = {str(error) for error in errors}
            self._ended.wait(SHIP_SECONDS)


def _forget_oldest(known: OrderedDict[str, Any]) -> None:
    while len(known) > MAX_QUEUED:
        known.popitem(last=False)


def _errors_of(steps: Iterable[Callable[[], object]]) -> list[Exception]:
    """Take steps that do not need each other, and return their errors: the thread must not end."""
    found: list[Exception] = []
    for step in steps:
        try:
            step()
        except Exception as error:
            found.append(error)
    return found


def open_prediction_log(home: Path, lineage: str) -> PredictionLog | None:
    """Return the log that the settings ask for, not started yet; None: DEAL_LOG_PREDICTIONS is off."""
    serving, settings = ServingSettings(), StoreSettings()
    if serving.log_predictions == "off":
        return None
    store = open_store(settings.store_uri, settings)
    return PredictionLog(
        store,
        home,
        lineage,
        keeps_texts=serving.log_predictions == "texts",
        retention_days=serving.log_retention_days,
    )
