"""Files and folders that land in the inbox are adapted one after another, oldest first, each content once.

A command runs `watch`. On a Prefect server, `flows.sensor` claims what is due and starts `adapt_landed` for it. Both go
the same way: look at the inbox, claim a batch, learn it, note how that ended; see `tasks.arrival_queue`. The section
`retrain` of a lineage's file says what has to wait.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Annotated

from prefect import flow, runtime
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
from deal_core.shown import Shown
from flows.adapt import adapt_locked
from flows.adapt_result import AdaptResult
from flows.consolidate import ConsolidationLook, consolidate_locked, look_at_consolidation
from flows.lock import LineageBusyError, lock_lineage
from infra.lineage_state import Batch, LineageState, read_state, update
from infra.outcomes import Outcome
from infra.settings import InboxSettings
from infra.store.base import ObjectStore
from infra.store.keys import INBOX, SUCCESS_FILE, task_of
from infra.store.opening import open_store
from tasks.arrival_queue import PAUSE, Plan, Result, claim_consolidation, dissolve, open_again, put_back
from tasks.arrivals import claim_next, end_try, plan_now, sense_inbox
from tasks.inbox import InboxLook, find_landed, look, task_spec
from tasks.lineage.branch import why_waiting
from tasks.lineage.settings import WatchedLineage, read_lineage
from tasks.notices import announce_failure
from tasks.progress import Interrupted, is_stopped, reporter
from tasks.spec import TaskFieldsError

logger = logging.getLogger(__name__)
MAX_NAME = 200
"""Characters of a file's name in a message."""


class Seen(BaseModel, frozen=True):
    """A file that was handled, and the outcome."""

    key: Annotated[str, Shown("file")]
    """The file, as inbox/TASK/FILE."""
    outcome: Annotated[Outcome, Shown()]
    """What became of it."""
    version: Annotated[str | None, Shown()]
    """The version that learned it, if one did."""
    message: Annotated[str, Shown("what happened")]
    """What became of it, in one sentence."""


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


@dataclass
class Tally:
    """What a watch or a run has done so far."""

    keeps_runs: bool = False
    """Whether the results are kept in memory, each with an accuracy matrix."""
    files: list[Seen] = field(default_factory=list)
    runs: list[AdaptResult] = field(default_factory=list)
    not_consolidated: str | None = None
    """Number of the champion whose consolidation has failed in this process."""

    def result(self, lineage: str) -> WatchResult:
        """Return it."""
        return WatchResult(lineage=lineage, files=tuple(self.files), runs=tuple(self.runs))


@flow(name="watch", flow_run_name="watch-{spec.lineage}")
async def watch(spec: WatchedLineage, once: bool = False, poll_seconds: float = 2.0) -> WatchResult:
    """Adapt a lineage to files that land in the inbox.

    Args:
        spec: The lineage and its settings. The place of each file decides its task and schema.
        once: End when all present files are handled. Some wait: by the lineage's settings `retrain`, or as
            folders without a mark, which may still be written. What has failed before is tried again.
        poll_seconds: Pause between two looks. A file that has changed within this time is not handled yet.

    Raises:
        Interrupted: With `once`, the user stopped the watch before all files were handled.
    """
    store, lineage, tally = open_store(), spec.lineage, Tally(keeps_runs=once)
    failed_before = datetime.now(UTC) if once else None
    if not once:
        reporter().said(f"Watching {store.uri_of(INBOX)}/TASK/FILE; Ctrl-C ends it.")
    has_looked, told, was_held = False, list[str](), None
    while True:
        num_before, looks_again = len(tally.files), False
        try:
            held, inbox = why_waiting(store, lineage), look(store)
            state = sense_inbox(store, spec, inbox, poll_seconds)
            planned = plan_now(store, spec, state, failed_before)
            told = _say_what_waits(planned, state, inbox, told)
            if held is None and not is_stopped() and (planned.due or _consolidation(store, spec, inbox, tally).is_due):
                async with lock_lineage(lineage):
                    looks_again = await _learn_what_is_due(store, spec, inbox, tally, failed_before=failed_before)
                state = read_state(store, lineage)
                planned = plan_now(store, spec, state, failed_before)
            has_looked = True
        except (StoreError, RegistryError) as error:
            if once or not has_looked or is_stopped():
                raise
            store.warn_once("watch", f"The watch tries again every {poll_seconds:g} s: {error}")
            await asyncio.sleep(poll_seconds)
            continue
        is_left = looks_again or bool(planned.due or _growing(state, inbox))
        if once and is_left and is_stopped():
            raise Interrupted
        if held and held != was_held:
            reporter().said(f"Lineage '{lineage}' learns nothing now: {held}")
        was_held = held
        if is_stopped() or (once and (held or not is_left)):
            return tally.result(lineage)
        if not tally.files or tally.files[num_before:]:
            reporter().stage_started("waiting")
        await asyncio.sleep(poll_seconds)


@flow(name="adapt-landed", flow_run_name="adapt-landed-{lineage}")
async def adapt_landed(lineage: str, settle_seconds: float = 2.0) -> WatchResult:
    """Adapt a lineage to what is due, oldest first, until nothing is. A server starts this for a batch.

    If another run holds the lineage, this run ends at once and leaves its place to other lineages. Its batch is tried
    again later.

    Args:
        lineage: Its name; `tasks.lineage.settings` reads its settings from the store.
        settle_seconds: A file that has changed within this time may still be written.
    """
    store, tally, run = open_store(), Tally(), runtime.flow_run.id
    spec = read_lineage(store, lineage)

    def leave(why: str, pause: timedelta) -> None:
        reporter().said(why)
        update(store, lineage, partial(put_back, run=run, due=datetime.now(UTC) + pause))

    while not is_stopped():
        if (held := why_waiting(store, lineage)) is not None:
            leave(f"Lineage '{lineage}' learns nothing now: {held}", timedelta(0))
            break
        inbox = look(store)
        state = sense_inbox(store, spec, inbox, settle_seconds)
        if plan_now(store, spec, state).due or _consolidation(store, spec, inbox, tally).is_due:
            try:
                async with lock_lineage(lineage, wait=False):
                    await _learn_what_is_due(store, spec, inbox, tally, run=run)
            except LineageBusyError as busy:
                leave(f"{busy} Landed files are learned afterwards.", PAUSE)
                break
        elif _growing(state, inbox):
            await asyncio.sleep(settle_seconds)
        else:
            break
    return tally.result(lineage)


def _growing(state: LineageState, inbox: InboxLook) -> list[str]:
    """The arrivals that are complete soon. Folders without a mark may be written for long, and are not among them."""
    quiet = {arrival.key for arrival in inbox.arrivals if arrival.waits_for_quiet}
    return [key for key, note in state.arrivals.items() if note.state == "landed" and key not in quiet]


def _say_what_waits(planned: Plan, state: LineageState, inbox: InboxLook, told: Sequence[str]) -> list[str]:
    """Say what waits, each time that it changes; return what was said."""
    waiting = [task.line() for task in planned.waiting if not task.is_due]
    waiting += [
        f"{arrival.key.removeprefix(INBOX + '/')} has no file {SUCCESS_FILE}; it is learned when nothing in it has "
        f"changed for {InboxSettings().inbox_settle_seconds:g} seconds."
        for arrival in inbox.arrivals
        if arrival.waits_for_quiet and (note := state.arrivals.get(arrival.key)) and note.state == "landed"
    ]
    for line in waiting:
        if line not in told:
            reporter().said(line)
    return waiting


async def _learn_what_is_due(
    store: ObjectStore,
    spec: WatchedLineage,
    inbox: InboxLook,
    tally: Tally,
    *,
    failed_before: datetime | None = None,
    run: str | None = None,
) -> bool:
    """Claim one batch after another and learn it, until nothing is due. The caller holds the lineage.

    Return whether the inbox is to be looked at again, because `inbox`, the last look, does not have all that is due.
    """
    lineage, looks_again = spec.lineage, False
    while not is_stopped() and why_waiting(store, lineage) is None:
        looks_again |= await _consolidate(store, spec, inbox, tally, run)
        state = claim_next(store, spec, failed_before, is_alone=True, run=run)
        batch = state.claimed
        if batch is None:
            break
        if not batch.files:  # a consolidation that a crash has interrupted
            looks_again |= await _consolidate(store, spec, inbox, tally, run, batch)
            continue
        for key in batch.files:
            present = find_landed(store, key)
            if present is None or present.etag != state.arrivals[key].etag:  # it may still be written
                update(store, lineage, partial(dissolve, id_=batch.id))
                return True
        result, adapted = await _adapt_to(store, spec, batch.files)
        ended = end_try(store, lineage, batch, result, inbox)
        if ended.outcome == "split":
            reporter().said("The files are now learned one after another, so that only those that are bad are refused.")
            continue
        if ended.outcome != result.outcome:
            reporter().said(f"Refused: {ended.message}")
        tally.files += [
            Seen(key=key, outcome=ended.outcome, message=ended.message, version=ended.version) for key in batch.files
        ]
        tally.runs += [adapted] if adapted is not None and tally.keeps_runs else []
    return looks_again


def _consolidation(store: ObjectStore, spec: WatchedLineage, inbox: InboxLook, tally: Tally) -> ConsolidationLook:
    """Return what is to be done about consolidations; one that has failed is not tried again."""
    consolidation = look_at_consolidation(store, spec, inbox)
    return consolidation._replace(why=None) if consolidation.champion == tally.not_consolidated else consolidation


async def _consolidate(
    store: ObjectStore,
    spec: WatchedLineage,
    inbox: InboxLook,
    tally: Tally,
    run: str | None,
    batch: Batch | None = None,
) -> bool:
    """Consolidate the lineage if its settings say so. A failure is told once, and the lineage learns on.

    `batch` is the one that was claimed for it by a process that has died. Return whether arrivals are open again.
    """
    lineage, consolidation = spec.lineage, _consolidation(store, spec, inbox, tally)
    if consolidation.why is not None and batch is None:  # so that a server notices if this process dies
        new_id = uuid.uuid4().hex[:12]
        change = partial(claim_consolidation, now=datetime.now(UTC), new_id=new_id, run=run)
        batch = update(store, lineage, change).batch(new_id)
    if batch is not None:
        message = ""
        if consolidation.why is not None:
            reporter().said(f"{lineage} is consolidated. {consolidation.why}")
            try:
                await consolidate_locked(spec)
            except Interrupted:
                raise
            except Exception as error:
                tally.not_consolidated = consolidation.champion
                logger.exception("The consolidation of %s failed", lineage)
                message = f"Not consolidated: {in_one_line(error)}"
                reporter().said(message)
        end_try(store, lineage, batch, Result("repeat", message), inbox)
        consolidation = _consolidation(store, spec, inbox, tally)
    if consolidation.again:
        update(store, lineage, partial(open_again, arrivals=consolidation.again, now=datetime.now(UTC)))
        again = listed([arrival.key for arrival in consolidation.again])
        reporter().said(f"{again}: learned again, on the consolidation.")
    return bool(consolidation.again)


async def _adapt_to(store: ObjectStore, spec: WatchedLineage, keys: Sequence[str]) -> tuple[Result, AdaptResult | None]:
    """Learn an arrival of one or several files; return how that ended, and the result of its run.

    A refused arrival is not tried again. A failed one is: once if a file of it killed its reader. Of several files that
    are refused together, some may be good.
    """
    names = [key.removeprefix(INBOX + "/") for key in keys]
    reporter().said(f"{listed(names, width=MAX_NAME)} {'has' if len(names) == 1 else 'have'} landed")
    try:
        try:
            arrival = spec.with_task(task_spec(store, *keys))
        except Exception as error:  # no adaptation begins that would announce it
            await asyncio.to_thread(announce_failure, spec.lineage, task_of(keys[0]), error)
            raise
        run = await adapt_locked(arrival, spec.retrain)
    except ReaderDiedError as error:  # for the first time it may have been for want of memory
        reporter().said(f"Failed: {in_one_line(error)}")
        outcome = "split" if len(keys) > 1 else "failed"
        return Result(outcome, in_one_line(error), has_killed_reader=True), None
    except DataValidationError as error:
        reporter().said(f"Refused: {in_one_line(error)}")
        is_one_file = len(keys) > 1 and not isinstance(error, TaskFieldsError)
        return Result("split" if is_one_file else "refused", in_one_line(error)), None
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
        return Result("failed", message, is_final=is_final), None
    assert run.status != "remade", "a watch makes no branch"
    if run.status == "held":
        reporter().said(f"Held: {run.message}")
        return Result("held", run.reasons[0]), run
    return Result(run.status, run.message, None if run.status == "skipped" else run.version), run
