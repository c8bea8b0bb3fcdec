"""Files and folders that land in the inbox are adapted one after another, oldest first, each content once.

A command runs `watch`. On a Prefect server, `flows.announce` announces files, and each announcement starts
`adapt_landed`. The section `retrain` of a lineage's file says what has to wait; see `tasks.waiting`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import NamedTuple

from prefect import flow, runtime
from prefect.settings import get_current_settings
from pydantic import BaseModel

from deal_core.errors import (
    DataValidationError,
    ReaderDiedError,
    RegistryError,
    StoreError,
    TrainingDivergedError,
    in_one_line,
)
from deal_core.safe_text import listed
from flows.adapt import AdaptResult, adapt_locked
from flows.consolidate import ConsolidationLook, consolidate_locked, look_at_consolidation, open_again
from flows.lock import LineageBusyError, lock_lineage
from infra.settings import InboxSettings
from infra.store.base import ObjectStore
from infra.store.keys import INBOX, SUCCESS_FILE, task_of
from tasks import arrival_runs
from tasks.context import current_store
from tasks.inbox import (
    Arrival,
    InboxLook,
    InboxState,
    Outcome,
    find_landed,
    known_state,
    look,
    read_state,
    settle,
    task_spec,
    write_state,
)
from tasks.lineage.branch import why_waiting
from tasks.lineage.settings import WatchedLineage, read_lineage
from tasks.notices import announce_failure
from tasks.progress import Interrupted, is_stopped, reporter
from tasks.spec import TaskFieldsError
from tasks.waiting import Due, freeze_batch, plan, read_batches, split_batch

logger = logging.getLogger(__name__)
MAX_NAME = 200
"""Characters of a file's name in a message."""


class Seen(BaseModel, frozen=True):
    """A file that was handled, and the outcome."""

    key: str
    """The file, as inbox/TASK/FILE."""
    outcome: str
    """What became of it, in a word such as promoted, rejected, refused or failed."""
    message: str
    """What became of it, in one sentence."""
    version: str | None
    """The version that learned it, if one did."""


class WatchResult(BaseModel, frozen=True):
    """The files that a watch handled."""

    lineage: str
    files: tuple[Seen, ...]
    runs: tuple[AdaptResult, ...] = ()
    """The results, if the watch ends when all files are handled; else empty."""

    @property
    def num_refused(self) -> int:
        """Number of files that were refused or whose run failed."""
        return sum(seen.outcome in ("refused", "failed") for seen in self.files)

    @property
    def num_rejected(self) -> int:
        """Number of files whose version the gate rejected, or that are held because their labels disagree."""
        return sum(seen.outcome in ("rejected", "held") for seen in self.files)


@flow(name="watch", flow_run_name="watch-{spec.lineage}")
async def watch(spec: WatchedLineage, once: bool = False, poll_seconds: float = 2.0) -> WatchResult:
    """Adapt a lineage to files that land in the inbox.

    Args:
        spec: The lineage and its settings. The place of each file decides its task and schema.
        once: End when all present files are handled. Some wait: by the lineage's settings `retrain`, or as
            folders without a mark, which may still be written.
        poll_seconds: Pause between two looks. A file that changes between two looks is not handled yet.

    Raises:
        Interrupted: With `once`, the user stopped the watch before all files were handled.
    """
    store = current_store()
    worker = InboxWorker(store, spec, settle_seconds=poll_seconds, once=once, wait=True)
    if not once:
        reporter().said(f"Watching {store.uri_of(INBOX)}/TASK/FILE; Ctrl-C ends it.")
    has_looked = False
    was_held: str | None = None
    while True:
        try:
            held = worker.why_held()
            num_handled = 0 if held else await worker.handle_open()
            has_looked = True
        except (StoreError, RegistryError) as error:
            if once or not has_looked or is_stopped():
                raise
            store.warn_once("watch", f"The watch tries again every {poll_seconds:g} s: {error}")
            await asyncio.sleep(poll_seconds)
            continue
        if once and worker.num_left and is_stopped():
            raise Interrupted
        if held and held != was_held:
            reporter().said(f"Lineage '{spec.lineage}' learns nothing now: {held}")
        was_held = held
        if is_stopped() or (once and (held or not worker.num_left)):
            return worker.result()
        if num_handled or not worker.files:
            reporter().stage_started("waiting")
        await asyncio.sleep(poll_seconds)


@flow(name="adapt-landed", flow_run_name="adapt-landed-{lineage}")
async def adapt_landed(lineage: str, settle_seconds: float = 2.0) -> WatchResult:
    """Adapt a lineage to what is due, oldest first, until nothing is. A server starts this for announced files.

    If another run holds the lineage, this run ends at once and leaves its place to other lineages. An `adapt_landed`
    that holds the lineage looks at the inbox again before it ends; after any other run, open files are announced again.
    A run that restarts after a crash waits, because its own earlier hold may not have ended yet.

    Args:
        lineage: Its name; `tasks.lineage.settings` reads its settings from the store.
        settle_seconds: See `InboxWorker`.
    """
    store = current_store()
    spec = read_lineage(store, lineage)
    if (held := why_waiting(store, lineage)) is not None:
        reporter().said(f"Lineage '{lineage}' learns nothing now: {held}")
        return WatchResult(lineage=lineage, files=())
    is_rerun = (runtime.flow_run.run_count or 1) > 1
    worker = InboxWorker(store, spec, settle_seconds=settle_seconds, once=False, wait=is_rerun)
    try:
        while await worker.handle_open() or worker.num_left:
            if is_stopped() or worker.why_held():
                break
            if worker.num_left:
                await asyncio.sleep(settle_seconds)
    except LineageBusyError as busy:
        reporter().said(f"{busy} Landed files are learned afterwards.")
    return worker.result()


@dataclass
class InboxWorker:
    """Adapts a lineage to its open files in the inbox."""

    store: ObjectStore
    spec: WatchedLineage
    settle_seconds: float
    """A file is complete if it has not changed for this time or since the previous look."""
    once: bool
    """Whether the watch ends. Then its first look tries failed files again, and all results are kept in memory."""
    wait: bool
    """Whether to wait for another run that holds the lineage."""
    files: list[Seen] = field(default_factory=list)
    runs: list[AdaptResult] = field(default_factory=list)
    num_left: int = 0
    """Open arrivals that the last look did not handle: incomplete ones, what is due after the first batch, and all
    others after a request to stop. Two kinds may wait for long and do not count: what waits by the settings
    `retrain`, and folders without a file `_SUCCESS`, which are complete when nothing in them has changed for a
    while."""
    _stamps: dict[str, str] = field(default_factory=dict)
    _has_looked: bool = False
    _not_consolidated: str | None = None
    """Number of the champion whose consolidation has failed in this process."""
    _told: list[str] = field(default_factory=list)
    """What the last look has said about files that wait."""

    async def handle_open(self) -> int:
        """Look at the inbox and adapt to what is due and complete, oldest first. Return the number of its files.

        Raises:
            LineageBusyError: Without `wait`, another run holds the lineage.
        """
        inbox, state = look(self.store), known_state(self.store, self.spec.lineage)
        settled, growing = settle(
            inbox,
            state,
            self.spec.tasks,
            self._stamps,
            settle_seconds=self.settle_seconds,
            retry_now=self._retries,
        )
        planned = plan(self.store, self.spec, inbox, state, settled, datetime.now(UTC))
        quiet = [info for info in growing if info.waits_for_quiet]
        self.num_left = len(planned.files) + len(growing) - len(quiet)
        # what waits is said each time that it changes
        waiting = [task.line() for task in planned.waiting if not task.is_due]
        waiting += [
            f"{info.key.removeprefix(INBOX + '/')} has no file {SUCCESS_FILE}; it is learned when nothing in it has "
            f"changed for {InboxSettings().inbox_settle_seconds:g} seconds."
            for info in quiet
        ]
        for line in waiting:
            if line not in self._told:
                reporter().said(line)
        self._told = waiting
        if planned.due or self._look_at_consolidation(inbox).is_due:
            async with lock_lineage(self.spec.lineage, wait=self.wait):
                held = await self._hold_cancelled(planned.files)
                await self._consolidate(inbox)  # such as one that a crash has interrupted
                for due in planned.due:
                    if is_stopped() or self.why_held():
                        break
                    if num_held := sum(info.key in held for info in due.files):
                        self.num_left -= num_held
                    elif await self._handle(due, inbox):
                        self.num_left -= len(due.files)
                        await self._consolidate(inbox)
                    if self.spec.retrain.may_wait:
                        break  # what was learned now may have used up the budget: look and decide again
        self._has_looked = True
        return len(planned.files)

    def _look_at_consolidation(self, inbox: InboxLook) -> ConsolidationLook:
        """Return what is to be done about consolidations; one that has failed is not tried again."""
        consolidation = look_at_consolidation(self.store, self.spec, inbox)
        return consolidation._replace(why=None) if consolidation.champion == self._not_consolidated else consolidation

    async def _consolidate(self, inbox: InboxLook) -> None:
        """Consolidate the lineage if its settings say so. A failure is told once, and the lineage learns on."""
        consolidation = self._look_at_consolidation(inbox)
        if consolidation.why is not None and not is_stopped() and not self.why_held():
            reporter().said(f"{self.spec.lineage} is consolidated. {consolidation.why}")
            try:
                await consolidate_locked(self.spec)
            except Interrupted:
                raise
            except Exception as error:
                self._not_consolidated = consolidation.champion
                logger.exception("The consolidation of %s failed", self.spec.lineage)
                reporter().said(f"Not consolidated: {in_one_line(error)}")
            consolidation = self._look_at_consolidation(inbox)
        if consolidation.again:
            open_again(self.store, self.spec.lineage, consolidation.again)
            self.num_left += len(consolidation.again)

    @property
    def _retries(self) -> bool:
        """Whether this look tries failed files again, whatever their number of tries."""
        return self.once and not self._has_looked

    async def _hold_cancelled(self, arrivals: Sequence[Arrival]) -> tuple[str, ...]:
        """Hold arrivals of cancelled runs. Note the others, so that a person who cancels this run holds all of them."""
        if not get_current_settings().api.url:
            return ()
        name = self.spec.lineage
        announced = arrival_runs.read_announcements(self.store, name, arrivals)
        held = await arrival_runs.hold_cancelled(self.store, name, arrivals, announced)
        for info in arrivals:
            if info.key not in held and info.key not in announced:
                arrival_runs.note_announced(self.store, name, info)
        return held

    def why_held(self) -> str | None:
        """Return why what lands waits now: `deal lineage pause`, or an open branch; None: it is learned."""
        return why_waiting(self.store, self.spec.lineage)

    async def _handle(self, due: Due, inbox: InboxLook) -> bool:
        """Adapt to an arrival. False: a file has changed since the look, so it may still be written; look again."""
        store, lineage, files, now = self.store, self.spec.lineage, due.files, datetime.now(UTC)
        for info in files:
            present = find_landed(store, info.key)
            if present is None or present.etag != info.etag:
                return False
        state = read_state(store, lineage)
        still_open = [info for info in files if state.is_open(info, now, retry_now=self._retries)]
        if len(still_open) < len(files):
            return not still_open  # another run has handled the files since the look
        for batch in read_batches(store, lineage):
            if batch.is_over(inbox, state, now):  # left by a crash, a changed file or a cancelled run
                store.delete(batch.key)
        open_batch = due.batch
        if due.is_fixed:
            open_batch = freeze_batch(store, lineage, task_of(files[0].key), files, now)
            if not open_batch.is_of(files):
                return False  # another run has fixed other files since the look
        learned = await _adapt_to(store, self.spec, files)
        if learned.may_be_one_file and open_batch is not None and len(files) > 1:
            reporter().said("The files are now learned one after another, so that only those that are bad are refused.")
            split_batch(store, open_batch)
            return False
        state = self._record(files, learned)
        if open_batch is not None and open_batch.is_over(inbox, state, datetime.now(UTC)):
            store.delete(open_batch.key)
        return True

    def _record(self, files: Sequence[Arrival], learned: Learned) -> InboxState:
        """Note the outcome of an arrival for each of its files, all at once. Return the lineage's new state."""
        store, lineage, run = self.store, self.spec.lineage, learned.run
        gone = read_state(store, lineage).gone(store)
        state = read_state(store, lineage)  # a command may have written the state meanwhile
        for key in gone:
            state.files.pop(key, None)
        for info in files:
            handled = state.record(
                info,
                learned.outcome,
                learned.message,
                now=datetime.now(UTC),
                version=run.version if run and run.status not in ("skipped", "held") else None,
                is_final=learned.is_final,
                has_killed_reader=learned.has_killed_reader,
            )
            if handled.outcome != learned.outcome:
                reporter().said(f"Refused: {handled.message}")
            self.files.append(
                Seen(key=info.key, outcome=handled.outcome, message=handled.message, version=handled.version)
            )
        write_state(store, lineage, state)
        for info in files:
            if state.files[info.key].due() is None:
                arrival_runs.drop_announcement(store, lineage, info)
        if run and self.once:
            self.runs.append(run)
        return state

    def result(self) -> WatchResult:
        """Return the files that were handled."""
        return WatchResult(lineage=self.spec.lineage, files=tuple(self.files), runs=tuple(self.runs))


class Learned(NamedTuple):
    """The result of one file."""

    outcome: Outcome
    message: str
    run: AdaptResult | None = None
    is_final: bool = False
    """See `Handled`."""
    has_killed_reader: bool = False
    """Whether the file ended the process that read it."""
    may_be_one_file: bool = False
    """Whether an arrival of several files may have been refused for some of them only."""


async def _adapt_to(store: ObjectStore, spec: WatchedLineage, files: Sequence[Arrival]) -> Learned:
    """Adapt to an arrival of one or several files. A refused arrival is not tried again.

    A failed one is: once if a file of it killed its reader.
    """
    names = [info.key.removeprefix(INBOX + "/") for info in files]
    reporter().said(f"{listed(names, width=MAX_NAME)} {'has' if len(names) == 1 else 'have'} landed")
    try:
        try:
            arrival = spec.with_task(task_spec(store, *(info.key for info in files)))
        except Exception as error:  # no adaptation begins that would announce it
            await asyncio.to_thread(announce_failure, spec.lineage, task_of(files[0].key), error)
            raise
        run = await adapt_locked(arrival, spec.retrain)
    except ReaderDiedError as error:  # for the first time it may have been for want of memory
        reporter().said(f"Failed: {in_one_line(error)}")
        return Learned("failed", in_one_line(error), has_killed_reader=True, may_be_one_file=True)
    except DataValidationError as error:
        reporter().said(f"Refused: {in_one_line(error)}")
        return Learned("refused", in_one_line(error), may_be_one_file=not isinstance(error, TaskFieldsError))
    except Interrupted:
        raise
    except Exception as error:
        logger.exception("The run for %s failed", listed(names))
        message = in_one_line(error)
        is_final = isinstance(error, TrainingDivergedError)  # same seed and settings: it diverges at the same step
        if is_final:
            message = (
                f"{message.rstrip('.')}. It is not tried again automatically: change the settings and try it with: "
                f"deal adapt SPEC --watch --once --lineage {spec.lineage}; or change file, task.yaml or test rows."
            )
        reporter().said(f"Failed: {message}")
        return Learned("failed", message, is_final=is_final)
    assert run.status != "remade", "a watch makes no branch"
    if run.status == "held":
        reporter().said(f"Held: {run.message}")
        return Learned("held", run.reasons[0], run)
    return Learned(run.status, run.message, run)
