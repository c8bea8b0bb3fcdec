"""Files and folders that land in the inbox are adapted one after another, oldest first, each content once.

A command runs `watch`. On a Prefect server, `watch_inbox` and `flows.retrain` announce files, and each announcement
starts `adapt_landed`. The section `retrain` of a lineage's file says what has to wait; see `tasks.waiting`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from prefect import flow, runtime
from prefect.settings import get_current_settings
from pydantic import BaseModel

from deal_core.errors import (
    DataValidationError,
    DealError,
    ReaderDiedError,
    RegistryError,
    StoreError,
    TrainingDivergedError,
    in_one_line,
)
from deal_core.safe_text import listed
from flows.adapt import AdaptResult, adapt_locked
from flows.lock import LineageBusyError, is_locked_on_server, lock_lineage
from infra.settings import InboxSettings
from infra.store.base import ObjectInfo, ObjectStore
from infra.store.keys import INBOX, SUCCESS_FILE, task_of
from infra.store.s3 import open_landing_queue
from tasks import arrival_runs, batches
from tasks.context import current_store
from tasks.inbox import (
    InboxLook,
    InboxState,
    KnownStates,
    Outcome,
    TestFiles,
    find_landed,
    look,
    read_state,
    settle,
    task_spec,
    waits_for_quiet,
    write_state,
)
from tasks.lineage.settings import WatchedLineage, list_lineages, read_lineage, why_held
from tasks.notices import announce_failure
from tasks.progress import Interrupted, is_stopped, reporter
from tasks.spec import AdaptSpec, TaskFieldsError
from tasks.waiting import Due, Plan, plan

logger = logging.getLogger(__name__)
QUEUE_SECONDS = 20.0
MAX_NAME = 200
"""Characters of a file's name in a message."""
Stamps = dict[str, str]


class Seen(BaseModel, frozen=True):
    """A file that was handled, and the outcome."""

    key: str
    outcome: str
    message: str
    version: str | None


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
        """Number of files whose version the gate rejected."""
        return sum(seen.outcome == "rejected" for seen in self.files)


@flow(name="watch", flow_run_name="watch-{spec.lineage}")
async def watch(
    spec: WatchedLineage, tasks: tuple[str, ...] = (), once: bool = False, poll_seconds: float = 2.0
) -> WatchResult:
    """Adapt a lineage to files that land in the inbox.

    Args:
        spec: The lineage and its settings. The place of each file decides its task and schema.
        tasks: Handle only files of these tasks; empty: all files.
        once: End when all present files are handled. Some wait: by the lineage's settings `retrain`, or as
            folders without a mark, which may still be written.
        poll_seconds: Pause between two looks. A file that changes between two looks is not handled yet.

    Raises:
        Interrupted: With `once`, the user stopped the watch before all files were handled.
    """
    store = current_store()
    worker = InboxWorker(store, spec, tasks, settle_seconds=poll_seconds, once=once, wait=True)
    if not once:
        reporter().said(f"Watching {store.uri_of(INBOX)}/TASK/FILE; Ctrl-C ends it.")
    has_looked = was_held = False
    while True:
        try:
            is_held = worker.is_held()
            num_handled = 0 if is_held else await worker.handle_open()
            has_looked = True
        except (StoreError, RegistryError) as error:
            if once or not has_looked or is_stopped():
                raise
            store.warn_once("watch", f"The watch tries again every {poll_seconds:g} s: {error}")
            await asyncio.sleep(poll_seconds)
            continue
        if once and worker.num_left and is_stopped():
            raise Interrupted
        if is_held and not was_held:
            reporter().said(f"Lineage '{spec.lineage}' is held; let it learn with: deal lineage resume {spec.lineage}.")
        was_held = is_held
        if is_stopped() or (once and (is_held or worker.num_left <= worker.num_quiet)):
            return worker.result()
        if num_handled or not worker.files:
            reporter().stage_started("waiting")
        await asyncio.sleep(poll_seconds)


@flow(name="adapt-landed", flow_run_name="adapt-landed-{lineage}")
async def adapt_landed(lineage: str, settle_seconds: float = 2.0, now: datetime | None = None) -> WatchResult:
    """Adapt a lineage to what is due, oldest first, until nothing is. A server starts this for announced files.

    If another run holds the lineage, this run ends at once and leaves its place to other lineages. An `adapt_landed`
    that holds the lineage looks at the inbox again before it ends; after any other run, open files are announced again.
    A run that restarts after a crash waits, because its own earlier hold may not have ended yet.

    Args:
        lineage: Its name; `tasks.lineage.settings` reads its settings from the store.
        settle_seconds: See `InboxWorker`.
        now: The time by which the settings `retrain` decide; None: that of the clock.
    """
    store = current_store()
    spec = read_lineage(store, lineage)
    if spec.held is not None:
        reporter().said(f"Lineage '{lineage}' is held ({spec.held}); nothing is learned.")
        return WatchResult(lineage=lineage, files=())
    is_rerun = (runtime.flow_run.run_count or 1) > 1
    worker = InboxWorker(store, spec, spec.tasks, settle_seconds=settle_seconds, once=False, wait=is_rerun, now=now)
    try:
        while await worker.handle_open() or worker.num_left > worker.num_quiet:  # those are announced in their time
            if is_stopped() or worker.is_held():
                break
            if worker.num_left > worker.num_quiet:
                await asyncio.sleep(settle_seconds)
    except LineageBusyError as busy:
        reporter().said(f"{busy} Landed files are learned afterwards.")
    return worker.result()


@dataclass
class InboxWorker:
    """Adapts a lineage to its open files in the inbox."""

    store: ObjectStore
    spec: WatchedLineage
    tasks: Collection[str]
    """Only files of these tasks are handled; empty: all files."""
    settle_seconds: float
    """A file is complete if it has not changed for this time or since the previous look."""
    once: bool
    """Whether the watch ends. Then its first look tries failed files again, and all results are kept in memory."""
    wait: bool
    """Whether to wait for another run that holds the lineage."""
    now: datetime | None = None
    """The time by which the settings `retrain` decide; None: that of the clock."""
    files: list[Seen] = field(default_factory=list)
    runs: list[AdaptResult] = field(default_factory=list)
    num_left: int = 0
    """Open arrivals that the last look did not handle: incomplete ones, what is due after the first batch, and all
    others after a request to stop. Those that wait by the settings `retrain` do not count."""
    num_quiet: int = 0
    """Those of them that are folders without a file `_SUCCESS` and are complete when they have not changed for long."""
    _stamps: Stamps = field(default_factory=dict)
    _test_files: TestFiles = field(default_factory=dict)
    _states: KnownStates = field(default_factory=KnownStates)
    _has_looked: bool = False
    _told: list[str] = field(default_factory=list)
    _said: set[str] = field(default_factory=set)

    async def handle_open(self) -> int:
        """Look at the inbox and adapt to what is due and complete, oldest first. Return the number of its files.

        Raises:
            LineageBusyError: Without `wait`, another run holds the lineage.
        """
        inbox = look(self.store, self._test_files)
        state = self._states.read(self.store, self.spec.lineage)
        settled, growing = settle(
            inbox,
            state,
            self.tasks,
            self._stamps,
            settle_seconds=self.settle_seconds,
            retry_now=self._retries,
        )
        found = plan(self.store, self.spec, inbox, state, settled, self.now or datetime.now(UTC))
        self._tell(found)
        self.num_left = len(found.files) + len(growing)
        self._say_what_waits(growing)
        if found.due:
            async with lock_lineage(self.spec.lineage, wait=self.wait):
                held = await self._hold_cancelled(inbox, found.files)
                for due in found.due:
                    if is_stopped() or self.is_held():
                        break
                    if any(info.key in held for info in due.files):
                        self.num_left -= sum(info.key in held for info in due.files)
                    elif await self._handle(due, inbox):
                        self.num_left -= len(due.files)
                    if self.spec.retrain.may_wait:
                        break  # what was learned now may have used up the budget: look and decide again
        self._has_looked = True
        return len(found.files)

    def _tell(self, found: Plan) -> None:
        """Say what waits, each time that it changes."""
        waiting = [each.line() for each in found.waiting if not each.is_due]
        for line in waiting:
            if line not in self._told:
                reporter().said(line)
        self._told = waiting

    def _say_what_waits(self, growing: Sequence[ObjectInfo]) -> None:
        """Count the folders without a mark, and say once for each why it is not learned yet."""
        quiet = {info.key: info for info in growing if waits_for_quiet(info)}
        self.num_quiet = len(quiet)
        for key in quiet.keys() - self._said:
            reporter().said(
                f"{key.removeprefix(INBOX + '/')} has no file {SUCCESS_FILE}; it is learned when nothing in it has "
                f"changed for {InboxSettings().inbox_settle_seconds:g} seconds."
            )
        self._said |= quiet.keys()

    @property
    def _retries(self) -> bool:
        """Whether this look tries failed files again, whatever their number of tries."""
        return self.once and not self._has_looked

    async def _hold_cancelled(self, inbox: InboxLook, arrivals: Sequence[ObjectInfo]) -> tuple[str, ...]:
        """Hold arrivals of cancelled runs. Note the others, so that a person who cancels this run holds all of them."""
        if not get_current_settings().api.url:
            return ()
        name = self.spec.lineage
        announced = arrival_runs.read_announcements(self.store, name, inbox, arrivals)
        held = await arrival_runs.hold_cancelled(self.store, name, inbox, arrivals, announced)
        for info in arrivals:
            if info.key not in held and info.key not in announced:
                arrival_runs.note_begun(self.store, name, info, inbox.stamp(info))
        return held

    def is_held(self) -> bool:
        """Return whether `deal lineage pause` has stopped the learning of what lands."""
        return why_held(self.store, self.spec.lineage) is not None

    async def _handle(self, due: Due, inbox: InboxLook) -> bool:
        """Adapt to an arrival. False: a file has changed since the look, so it may still be written; look again."""
        store, lineage, files, now = self.store, self.spec.lineage, due.files, datetime.now(UTC)
        for info in files:
            present = find_landed(store, info.key)
            if present is None or present.etag != info.etag:
                return False
        beside, state = inbox.stamp(files[0]), read_state(store, lineage)
        still_open = [info for info in files if state.is_open(info, now, beside=beside, retry_now=self._retries)]
        if len(still_open) < len(files):
            return not still_open  # another run has handled the files since the look
        self._end_batches(inbox, state)
        batch = due.batch
        if due.is_fixed:
            batch = batches.freeze(store, lineage, task_of(files[0].key), files, self.now or now)
            if not batch.is_of(files):
                return False  # another run has fixed other files since the look
        found = await _adapt_to(store, self.spec, files)
        if found.may_be_one_file and batch is not None and len(files) > 1:
            reporter().said("The files are now learned one after another, so that only those that are bad are refused.")
            batches.split(store, batch)
            return False
        self._record(files, found, beside)
        if batch is not None and batch.is_over(inbox, read_state(store, lineage), datetime.now(UTC)):
            batches.end(store, batch)
        return True

    def _end_batches(self, inbox: InboxLook, state: InboxState) -> None:
        """Remove batches that are over. A crash, a changed file or a cancelled run may have left them."""
        for batch in batches.read_batches(self.store, self.spec.lineage):
            if batch.is_over(inbox, state, datetime.now(UTC)):
                batches.end(self.store, batch)

    def _record(self, files: Sequence[ObjectInfo], found: Learned, beside: str) -> None:
        """Note the outcome of an arrival for each of its files, all at once."""
        store, lineage, run = self.store, self.spec.lineage, found.run
        gone = read_state(store, lineage).gone(store)
        state = read_state(store, lineage)  # a command may have written the state meanwhile
        for key in gone:
            state.files.pop(key, None)
        version = run.version if run and run.status != "skipped" else None
        for info in files:
            handled = state.record(
                info,
                found.outcome,
                found.message,
                now=datetime.now(UTC),
                beside=beside,
                version=version,
                is_final=found.is_final,
                has_killed_reader=found.has_killed_reader,
            )
            if handled.outcome != found.outcome:
                reporter().said(f"Refused: {handled.message}")
            self.files.append(
                Seen(key=info.key, outcome=handled.outcome, message=handled.message, version=handled.version)
            )
        write_state(store, lineage, state)
        for info in files:
            if state.files[info.key].due() is None:
                arrival_runs.drop_announcement(store, lineage, info, beside)
        if run and self.once:
            self.runs.append(run)

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


async def _adapt_to(store: ObjectStore, spec: WatchedLineage, files: Sequence[ObjectInfo]) -> Learned:
    """Adapt to an arrival of one or several files. A refused arrival is not tried again.

    A failed one is: once if a file of it killed its reader.
    """
    names = [info.key.removeprefix(INBOX + "/") for info in files]
    reporter().said(f"{listed(names, width=MAX_NAME)} {'has' if len(names) == 1 else 'have'} landed")
    try:
        run = await adapt_locked(await _spec_of(store, spec, [info.key for info in files]), spec.retrain)
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
                f"{message.rstrip('.')}. It is not tried again automatically: change the settings and try it with deal "
                f"watch --once --lineage {spec.lineage} --spec SPEC, or change file, task.yaml or test rows."
            )
        reporter().said(f"Failed: {message}")
        return Learned("failed", message, is_final=is_final)
    return Learned(run.status, run.message, run)


async def _spec_of(store: ObjectStore, spec: WatchedLineage, keys: Sequence[str]) -> AdaptSpec:
    """Return the spec of an arrival. A failure is announced here, because no adaptation begins that announces it."""
    try:
        return spec.with_task(task_spec(store, *keys))
    except Exception as error:
        await asyncio.to_thread(announce_failure, spec.lineage, task_of(keys[0]), error)
        raise


@flow(name="watch-inbox", flow_run_name="watch-inbox")
async def watch_inbox(for_seconds: float = 630.0, poll_seconds: float = 2.0) -> int:
    """Announce landed files to all lineages for a limited time. Return the number of announcements.

    With DEAL_LANDING_QUEUE_URL, a notification of the bucket starts a look at once. Notifications may get lost, so
    there is a look at least every 20 seconds.

    Args:
        for_seconds: Duration from the scheduled start. The next run starts a little earlier than this one ends, and the
            two do not announce a file twice.
        poll_seconds: Pause between two looks.
    """
    store, queue = current_store(), open_landing_queue()
    end = (runtime.flow_run.scheduled_start_time or datetime.now(UTC)) + timedelta(seconds=for_seconds)
    stamps: dict[str, Stamps] = {}
    test_files: TestFiles = {}
    states = KnownStates()
    num_announced = 0
    while True:
        found = await announce_all(store, stamps, test_files, states, poll_seconds)
        num_announced += found.num_announced
        if queue is not None:
            queue.done()
        left = (end - datetime.now(UTC)).total_seconds()
        if left <= 0 or is_stopped():
            return num_announced
        if queue is None or found.num_growing or not await asyncio.to_thread(queue.wait, min(left, QUEUE_SECONDS)):
            await asyncio.sleep(min(left, poll_seconds))


class Announced(NamedTuple):
    """The result of one look at the inbox."""

    num_announced: int
    num_growing: int
    """Files that may be incomplete: look again soon."""


async def announce_all(
    store: ObjectStore,
    stamps: dict[str, Stamps],
    test_files: TestFiles,
    states: KnownStates,
    settle_seconds: float,
    now: datetime | None = None,
) -> Announced:
    """Look at the inbox once, and announce what is due for every lineage. For `now` see `adapt_landed`."""
    try:
        lineages, inbox = list_lineages(store), look(store, test_files)
    except DealError as error:
        logger.error("The inbox could not be read: %s", error)
        return Announced(0, 1)
    num_announced = num_growing = 0
    for lineage in lineages:
        seen = stamps.setdefault(lineage.lineage, {})
        try:
            state = states.read(store, lineage.lineage)
            found = await announce_open(store, inbox, lineage, state, seen, settle_seconds, now)
        except DealError as error:  # continue with the other lineages
            logger.error("The inbox could not be read for lineage %s: %s", lineage.lineage, error)
            found = Announced(0, 1)
        num_announced += found.num_announced
        num_growing += found.num_growing
    return Announced(num_announced, num_growing)


async def announce_open(
    store: ObjectStore,
    inbox: InboxLook,
    lineage: WatchedLineage,
    state: InboxState,
    seen: Stamps,
    settle_seconds: float,
    now: datetime | None = None,
) -> Announced:
    """Announce a lineage's files that are due and complete; hold those of cancelled runs.

    `seen` has the previous look's stamps and gets those of this look. For `settle_seconds` see `InboxWorker`, for `now`
    see `adapt_landed`.
    """
    name = lineage.lineage
    if lineage.held is not None:
        return Announced(0, 0)
    settled, growing = settle(inbox, state, lineage.tasks, seen, settle_seconds=settle_seconds, retry_now=False)
    due = plan(store, lineage, inbox, state, settled, now or datetime.now(UTC)).files
    announced = arrival_runs.read_announcements(store, name, inbox, due)
    new = [info for info in due if info.key not in announced]
    lost = [info for info in due if info.key in announced]
    released = {info.key: known.at for info in due if (known := state.requeued(info))}
    for info in new:
        arrival_runs.announce(store, name, info, inbox.stamp(info), released.get(info.key))
        reporter().said(f"{info.key} has landed for lineage '{name}'")
    num_announced = len(new)
    if lost and not await is_locked_on_server(name):
        held = await arrival_runs.hold_cancelled(store, name, inbox, lost, announced)
        for info in [info for info in lost if info.key not in held][:1]:  # its run handles all open files
            num_announced += arrival_runs.announce_again(
                store, name, info, inbox.stamp(info), datetime.now(UTC), released.get(info.key)
            )
    return Announced(num_announced, len(growing))
