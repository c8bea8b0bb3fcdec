"""Watch the inbox for a server: say what has landed; the run that adapts to it is another one."""

from __future__ import annotations

import asyncio
import logging
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from prefect import flow, runtime

from deal_core.errors import DealError
from flows.lock import is_held_on_server
from infra.store.base import ObjectStore
from infra.store.s3 import open_landing_queue
from tasks.context import current_store
from tasks.inbox import (
    InboxLook,
    InboxState,
    KnownStates,
    TestFiles,
    announce,
    announce_again,
    look,
    read_announcement,
    settle,
)
from tasks.lineage.settings import WatchedLineage, list_lineages
from tasks.progress import is_stopped, reporter

logger = logging.getLogger(__name__)
QUEUE_SECONDS = 20.0
Stamps = dict[str, str]


@flow(name="watch-inbox", flow_run_name="watch-inbox")
async def watch_inbox(for_seconds: float = 630.0, poll_seconds: float = 2.0) -> int:
    """Announce what lands for every lineage, for a while; return how many announcements were made.

    With DEAL_LANDING_QUEUE_URL set, a notification of the bucket starts a look at once; looks without one still come,
    every 20 seconds, since notifications may get lost.

    Args:
        for_seconds: how long from when it was scheduled; the next one begins a little before, so that somebody always
            looks. What two of them announce counts once.
        poll_seconds: pause between two looks.
    """
    store, queue = current_store(), open_landing_queue()
    end = (runtime.flow_run.scheduled_start_time or datetime.now(UTC)) + timedelta(seconds=for_seconds)
    stamps: dict[str, Stamps] = {}
    test_files: TestFiles = {}
    states = KnownStates()
    num_announced = 0
    while True:
        found = await _announce_all(store, stamps, test_files, states, poll_seconds)
        num_announced += found.num_announced
        if queue is not None:
            queue.done()
        left = (end - datetime.now(UTC)).total_seconds()
        if left <= 0 or is_stopped():
            return num_announced
        if queue is None or found.num_growing or not await asyncio.to_thread(queue.wait, min(left, QUEUE_SECONDS)):
            await asyncio.sleep(min(left, poll_seconds))


class Announced(NamedTuple):
    """What a look at the inbox led to."""

    num_announced: int
    num_growing: int
    """Files that may still be written: look again soon."""


async def _announce_all(
    store: ObjectStore, stamps: dict[str, Stamps], test_files: TestFiles, states: KnownStates, settle_seconds: float
) -> Announced:
    """Look at the inbox once, and announce what is open for every lineage."""
    try:
        lineages, inbox = list_lineages(store), look(store, test_files)
    except DealError as error:
        logger.error("The inbox could not be looked at: %s", error)
        return Announced(0, 1)
    all_found = []
    for lineage in lineages:
        seen = stamps.setdefault(lineage.lineage, {})
        try:
            state = states.read(store, lineage.lineage)
            all_found.append(await announce_open(store, inbox, lineage, state, seen, settle_seconds))
        except DealError as error:  # of one lineage, or the store's of a moment: the others are looked after
            logger.error("The inbox could not be looked at for lineage %s: %s", lineage.lineage, error)
            all_found.append(Announced(0, 1))
    return Announced(sum(found.num_announced for found in all_found), sum(found.num_growing for found in all_found))


async def announce_open(
    store: ObjectStore, inbox: InboxLook, lineage: WatchedLineage, state: InboxState, seen: Stamps,
    settle_seconds: float,
) -> Announced:
    """Announce a lineage's open arrivals that are complete.

    Args:
        store: holds the inbox.
        inbox: what lies there.
        lineage: who has to learn them.
        state: what it has handled.
        seen: what the look before saw; replaced by what this one sees.
        settle_seconds: how long a file must have been left alone, unless the look before saw the same.
    """
    name = lineage.lineage
    settled, growing = settle(inbox, state, lineage.tasks, seen, settle_seconds=settle_seconds, retry_now=False)
    num_announced = 0
    lost = []
    for info in settled:
        if read_announcement(store, name, info, inbox.stamp(info)):
            lost.append(info)
            continue
        announce(store, name, info, inbox.stamp(info))
        reporter().said(f"{info.key} has landed for lineage '{name}'")
        num_announced += 1
    if lost and not await is_held_on_server(name):
        # one is enough: the run that takes it takes whatever is open
        again = announce_again(store, name, lost[0], inbox.stamp(lost[0]), datetime.now(UTC))
        num_announced += again
    return Announced(num_announced, len(growing))

