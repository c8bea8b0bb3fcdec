"""Watch: files that land in the inbox are adapted one by one, oldest first, each content once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import UTC, datetime

from prefect import flow
from pydantic import BaseModel

from deal_core.errors import DataValidationError, TrainingDivergedError, in_one_line
from flows.adapt import adapt_held
from flows.lock import hold_lineage
from flows.results import AdaptResult
from infra.store.base import ObjectInfo, ObjectStore
from infra.store.keys import INBOX, task_of
from tasks.context import current_store
from tasks.inbox.announcements import drop_announcement
from tasks.inbox.listing import Handled, InboxState, KnownStates, Outcome, read_state, write_state
from tasks.inbox.state import TestFiles, look, settle, task_spec
from tasks.notices import announce_failure
from tasks.progress import Interrupted, is_stopped, reporter
from tasks.spec import AdaptSpec, LineageSpec

logger = logging.getLogger(__name__)


class Seen(BaseModel, frozen=True):
    """A file and what became of it."""

    key: str
    outcome: str
    message: str
    version: str | None


@dataclass
class Taken:
    """What a run has handled so far, and what its last look at the inbox left."""

    keeps_runs: bool = False
    """A watch that goes on for ever has no use for them, and each holds its whole accuracy matrix."""
    files: list[Seen] = field(default_factory=list)
    runs: list[AdaptResult] = field(default_factory=list)
    num_left: int = 0
    """Open files that were not handled: those that may still be written and, once asked to stop, those not reached."""
    _stamps: dict[str, str] = field(default_factory=dict)
    _test_files: TestFiles = field(default_factory=dict)
    _states: KnownStates = field(default_factory=KnownStates)

    async def take(
        self, store: ObjectStore, spec: LineageSpec, tasks: Collection[str], *,
        settle_seconds: float, retry_now: bool, wait: bool,
    ) -> int:
        """Look once and adapt to what is open and complete, oldest first; return how many files that were.

        Args:
            store: holds the inbox.
            spec: the lineage and how it learns.
            tasks: look at these tasks' files only; none: at all.
            settle_seconds: how long a file must have been left alone, unless the look before saw the same.
            retry_now: also what failed lately; see `InboxState.is_open`.
            wait: for the run that holds the lineage, if one does.

        Raises:
            LineageBusyError: with `wait` off, another run holds the lineage.
        """
        inbox = look(store, self._test_files)
        settled, growing = settle(
            inbox, self._states.read(store, spec.lineage), tasks, self._stamps,
            settle_seconds=settle_seconds, retry_now=retry_now,
        )
        self.num_left = len(settled) + len(growing)
        if settled:
            async with hold_lineage(spec.lineage, wait=wait):
                for info in settled:
                    if is_stopped():
                        break
                    await self._handle(store, spec, info, inbox.stamp(info), retry_now)
                    self.num_left -= 1
        return len(settled)

    async def _handle(
        self, store: ObjectStore, spec: LineageSpec, info: ObjectInfo, beside: str, retry_now: bool
    ) -> None:
        state = read_state(store, spec.lineage)
        if not state.is_open(info, datetime.now(UTC), beside=beside, retry_now=retry_now):
            return  # done by the run that held the lineage meanwhile
        handled, run = await _adapt_to(store, spec, state, info, beside)
        state.drop_gone(store)
        write_state(store, spec.lineage, state)
        if handled.due() is None:
            drop_announcement(store, spec.lineage, info, beside)
        self.files.append(
            Seen(key=info.key, outcome=handled.outcome, message=handled.message, version=handled.version)
        )
        self.runs += [run] if run and self.keeps_runs else []


async def _adapt_to(
    store: ObjectStore, spec: LineageSpec, state: InboxState, info: ObjectInfo, beside: str
) -> tuple[Handled, AdaptResult | None]:
    """Adapt to one file; one that cannot be used is noted, so that it is reported once. Other errors may pass."""
    reporter().said(f"{info.key.removeprefix(INBOX + '/')} has landed")
    run: AdaptResult | None = None
    version: str | None = None
    is_final = False
    outcome: Outcome
    try:
        run = await adapt_held(await _spec_of(store, spec, info.key))
        outcome, message, version = run.status, run.message, run.version
    except DataValidationError as error:
        outcome, message = "refused", in_one_line(error)
        reporter().said(f"Refused: {message}")
    except Interrupted:
        raise
    except Exception as error:
        logger.exception("The run for %s failed", info.key)
        outcome, message = "failed", in_one_line(error)
        if isinstance(error, TrainingDivergedError):  # seed and settings stand, so it would diverge at the same step
            is_final = True
            message = (
                f"{message.rstrip('.')}. It is not tried again by itself: change the settings and try it with deal "
                f"watch --once --lineage {spec.lineage} --spec SPEC, or change file, task.yaml or test rows."
            )
        reporter().said(f"Failed: {message}")
    handled = state.record(
        info, outcome, message, now=datetime.now(UTC), beside=beside, version=version, is_final=is_final
    )
    return handled, run


async def _spec_of(store: ObjectStore, spec: LineageSpec, key: str) -> AdaptSpec:
    """The spec of one arrival; what is wrong with it is announced here, as no adaptation begins that could do it."""
    try:
        return spec.with_task(task_spec(store, key))
    except Exception as error:
        await asyncio.to_thread(announce_failure, spec.lineage, task_of(key), error)
        raise


class WatchResult(BaseModel, frozen=True):
    """What a watch that ended has handled."""

    lineage: str
    files: tuple[Seen, ...]
    runs: tuple[AdaptResult, ...] = ()
    """Of a watch that ends once everything is handled; empty of any other."""

    @property
    def num_refused(self) -> int:
        """Files that were refused, or whose run failed."""
        return sum(seen.outcome in ("refused", "failed") for seen in self.files)

    @property
    def num_rejected(self) -> int:
        """Files whose version the gate rejected."""
        return sum(seen.outcome == "rejected" for seen in self.files)


@flow(name="watch", flow_run_name="watch-{spec.lineage}")
async def watch(
    spec: LineageSpec, tasks: tuple[str, ...] = (), once: bool = False, poll_seconds: float = 2.0
) -> WatchResult:
    """Adapt a lineage to what lands in the inbox.

    Args:
        spec: the lineage and how it learns; each file's task and schema come from where it lies.
        tasks: look at these tasks' files only; none: at all.
        once: end when everything that is there has been handled.
        poll_seconds: pause between two looks; a file that changes between two looks is left alone.

    Raises:
        Interrupted: with `once`, the user asked it to stop before everything was handled.
    """
    store = current_store()
    taken = Taken(keeps_runs=once)
    if not once:
        reporter().said(f"Watching {store.uri_of(INBOX)}/TASK/FILE; Ctrl-C ends it.")
    while True:
        num_taken = await taken.take(
            store, spec, tasks, settle_seconds=poll_seconds, retry_now=once, wait=True
        )
        if once and taken.num_left and is_stopped():
            raise Interrupted
        if is_stopped() or (once and not taken.num_left):
            return WatchResult(lineage=spec.lineage, files=tuple(taken.files), runs=tuple(taken.runs))
        if num_taken or not taken.files:
            reporter().stage_started("waiting")
        await asyncio.sleep(poll_seconds)
