"""On a Prefect server: look at the inbox, and announce to each lineage what it has to learn. This starts its runs."""

from __future__ import annotations

import asyncio
import logging
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from prefect import flow, runtime

from deal_core.errors import DealError
from flows.lock import is_locked_on_server
from infra.branches import Branches
from infra.store.base import ObjectStore
from infra.store.s3 import open_landing_queue
from tasks import arrival_runs
from tasks.context import current_store
from tasks.inbox import InboxLook, InboxState, known_state, look, recognise, settle
from tasks.lineage.settings import WatchedLineage, list_lineages
from tasks.progress import is_stopped, reporter
from tasks.waiting import plan

logger = logging.getLogger(__name__)
QUEUE_SECONDS = 20.0
Stamps = dict[str, str]


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
    num_announced = 0
    while True:
        announced = await announce_all(store, stamps, poll_seconds)
        num_announced += announced.num_announced
        if queue is not None:
            queue.done()
        left = (end - datetime.now(UTC)).total_seconds()
        if left <= 0 or is_stopped():
            return num_announced
        if queue is None or announced.num_growing or not await asyncio.to_thread(queue.wait, min(left, QUEUE_SECONDS)):
            await asyncio.sleep(min(left, poll_seconds))


@flow(name="retrain")
async def retrain(settle_seconds: float = 2.0) -> int:
    """Announce what is due for every lineage, so that the server starts its runs; return the number of announcements.

    A lineage that is being learned is not started again: the run that holds it decides again before it ends. What was
    announced and has no run is announced again, with growing pauses.

    Args:
        settle_seconds: A file that has changed within this time may still be written, and waits for the next look.
    """
    return (await announce_all(current_store(), {}, settle_seconds)).num_announced


class Announced(NamedTuple):
    """The result of one look at the inbox."""

    num_announced: int
    num_growing: int
    """Files that may be incomplete: look again soon."""


async def announce_all(
    store: ObjectStore,
    stamps: dict[str, Stamps],
    settle_seconds: float,
) -> Announced:
    """Look at the inbox once, and announce what is due for every lineage."""
    try:
        lineages, inbox = list_lineages(store), look(store)
    except DealError as error:
        logger.error("The inbox could not be read: %s", error)
        return Announced(0, 1)
    num_announced = num_growing = 0
    for lineage in lineages:
        seen = stamps.setdefault(lineage.lineage, {})
        try:
            state = recognise(store, lineage.lineage, inbox, known_state(store, lineage.lineage))
            announced = await announce_open(store, inbox, lineage, state, seen, settle_seconds)
        except DealError as error:  # continue with the other lineages
            logger.error("The inbox could not be read for lineage %s: %s", lineage.lineage, error)
            announced = Announced(0, 1)
        num_announced += announced.num_announced
        num_growing += announced.num_growing
    return Announced(num_announced, num_growing)


async def announce_open(
    store: ObjectStore,
    inbox: InboxLook,
    lineage: WatchedLineage,
    state: InboxState,
    seen: Stamps,
    settle_seconds: float,
) -> Announced:
    """Announce a lineage's files that are due and complete; hold those of cancelled runs.

    `seen` has the previous look's stamps and gets those of this look. For `settle_seconds` see `InboxWorker`.
    """
    name = lineage.lineage
    if lineage.held is not None or Branches(store).open(name) is not None:
        return Announced(0, 0)
    settled, growing = settle(inbox, state, lineage.tasks, seen, settle_seconds=settle_seconds, retry_now=False)
    due = plan(store, lineage, inbox, state, settled, datetime.now(UTC)).files
    announced = arrival_runs.read_announcements(store, name, due)
    released = {info.key: note.at for info in due if (note := state.noted_as(info, "requeued"))}
    new = [info for info in due if info.key not in announced]
    for info in new:
        arrival_runs.announce(store, name, info, released.get(info.key))
        reporter().said(f"{info.key} has landed for lineage '{name}'")
    num_announced = len(new)
    # what was announced before and is still due: no run has come, it was lost, or a person has cancelled it
    overdue = [info for info in due if info.key in announced]
    if overdue and not await is_locked_on_server(name):
        held = await arrival_runs.hold_cancelled(store, name, overdue, announced)
        lost = next((info for info in overdue if info.key not in held), None)
        if lost is not None:  # its run handles all open files
            num_announced += arrival_runs.announce_again(
                store, name, lost, announced[lost.key], datetime.now(UTC), released.get(lost.key)
            )
    return Announced(num_announced, len(growing))
