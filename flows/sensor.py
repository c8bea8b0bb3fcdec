"""On a Prefect server: look at the inbox, claim what is due for each lineage, and start its run.

A look also sweeps: it asks the server what became of the runs that were started, and nothing else decides about that. A
run that a person has cancelled holds its arrivals. A run that is over and has not ended its batch has died, and another
one is started.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import NamedTuple

from prefect import flow, runtime
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.deployments import arun_deployment
from prefect.exceptions import ObjectNotFound

from deal_core.errors import DealError
from flows.lock import is_locked
from infra.branches import Branches
from infra.lineage_state import Batch, LineageState, update
from infra.store.base import ObjectStore
from infra.store.opening import open_store
from infra.store.s3 import open_landing_queue
from tasks.arrival_queue import hold, lose, with_run
from tasks.arrivals import claim_next, held_arrivals, plan_now, sense_inbox
from tasks.inbox import InboxLook, look
from tasks.lineage.settings import WatchedLineage, list_lineages
from tasks.progress import is_stopped, patient, reporter

logger = logging.getLogger(__name__)
QUEUE_SECONDS = 20.0
ADAPT = "adapt-landed/adapt"
"""The flow and the deployment whose runs learn what lands."""
CANCELLATION = (StateType.CANCELLING, StateType.CANCELLED)
"""The states of a run that a person cancels. The process of one that stays in the first may be gone."""


@flow(name="watch-inbox", flow_run_name="watch-inbox")
async def watch_inbox(for_seconds: float = 630.0, poll_seconds: float = 2.0) -> int:
    """Start runs for landed files of all lineages for a limited time. Return the number of runs.

    With DEAL_LANDING_QUEUE_URL, a notification of the bucket starts a look at once. Notifications may get lost, so
    there is a look at least every 20 seconds.

    Args:
        for_seconds: Duration from the scheduled start. The next run starts a little earlier than this one ends, and the
            two start nothing twice.
        poll_seconds: Pause between two looks.
    """
    store, queue = open_store(), open_landing_queue()
    end = (runtime.flow_run.scheduled_start_time or datetime.now(UTC)) + timedelta(seconds=for_seconds)
    num_started = 0
    while True:
        sensed = await sense_all(store, poll_seconds)
        num_started += sensed.num_started
        if queue is not None:
            queue.done()
        left = (end - datetime.now(UTC)).total_seconds()
        if left <= 0 or is_stopped():
            return num_started
        if queue is None or sensed.is_busy or not await asyncio.to_thread(queue.wait, min(left, QUEUE_SECONDS)):
            await asyncio.sleep(min(left, poll_seconds))


@flow(name="retrain")
async def retrain(settle_seconds: float = 2.0) -> int:
    """Start what is due for every lineage; return the number of runs.

    Args:
        settle_seconds: A file that has changed within this time may still be written, and waits for the next look.
    """
    return (await sense_all(open_store(), settle_seconds)).num_started


class Sensed(NamedTuple):
    """The result of one look at the inbox."""

    num_started: int
    is_busy: bool
    """Whether files may be incomplete, or runs are at work: look again soon."""


async def sense_all(store: ObjectStore, settle_seconds: float) -> Sensed:
    """Look at the inbox once for all lineages, sweep, and start what is due."""
    try:
        lineages, inbox = list_lineages(store), look(store)
    except DealError as error:
        logger.error("The inbox could not be read: %s", error)
        return Sensed(0, is_busy=True)
    num_started, is_busy = 0, False
    for lineage in lineages:
        try:
            state = sense_inbox(store, lineage, inbox, settle_seconds)
            state = await _sweep(store, lineage, inbox, state)
            has_started = await _start_what_is_due(store, lineage, state)
        except DealError as error:  # continue with the other lineages
            logger.error("The inbox could not be read for lineage %s: %s", lineage.lineage, error)
            is_busy = True
            continue
        num_started += has_started
        is_busy |= has_started or bool(state.batches)
        is_busy |= any(note.state == "landed" for note in state.arrivals.values())
    return Sensed(num_started, is_busy)


async def _sweep(store: ObjectStore, lineage: WatchedLineage, inbox: InboxLook, state: LineageState) -> LineageState:
    """Decide what became of the run of the claimed batch, from its state on the server; return the lineage's state."""
    name, batch, now = lineage.lineage, state.claimed, datetime.now(UTC)
    if batch is None or batch.run is None:
        return state
    run = await _find_run(batch.run)
    if run is not None and run.state is not None and run.state.type in CANCELLATION:
        at = run.state.timestamp
        change = partial(
            hold,
            id_=batch.id,
            attempt=batch.attempt,
            others=plan_now(store, lineage, state).due,
            why=f"Its run {run.name} was cancelled on {at.astimezone(UTC):%Y-%m-%d %H:%M} UTC.",
            seen_before=at,
            arrivals={arrival.key: arrival for arrival in inbox.arrivals},
        )
        swept, held = update(store, name, change), held_arrivals(state)
        for arrival in held_arrivals(swept):
            if arrival not in held:
                reporter().said(arrival.line(name))
        return swept
    if run is not None and (run.state is None or not run.state.is_final()):
        return state
    swept = update(store, name, partial(lose, id_=batch.id, attempt=batch.attempt, now=now))
    if (lost := swept.batch(batch.id)) is not None and lost.num_lost > batch.num_lost:
        how = "is not known to the server" if run is None else f"is {run.state_name}"
        reporter().said(f"The run of batch {batch.id} of lineage '{name}' {how} and has not ended it.")
    return swept


@patient
async def _find_run(id_: str) -> FlowRun | None:
    async with get_client() as client:
        with suppress(ObjectNotFound):
            return await client.read_flow_run(uuid.UUID(id_))
    return None


async def _start_what_is_due(store: ObjectStore, lineage: WatchedLineage, state: LineageState) -> bool:
    """Claim the next batch of a lineage, unless one is claimed, and start its run; return whether it was started.

    If this process dies in between, the next look starts the run: the server knows it by batch and attempt.
    """
    name, claimed = lineage.lineage, state.claimed
    if claimed is not None and claimed.run is not None:
        return False
    if claimed is None and not plan_now(store, lineage, state).due:
        return False
    if state.paused is not None or Branches(store).open(name) is not None or await is_locked(name):
        return False
    batch = claim_next(store, lineage).claimed
    if batch is None or batch.run is not None:  # another process was faster
        return False
    run = await _start(name, batch)
    update(store, name, partial(with_run, id_=batch.id, attempt=batch.attempt, run=run))
    for key in batch.files:
        reporter().said(f"{key} is learned by lineage '{name}'")
    return True


@patient
async def _start(lineage: str, batch: Batch) -> str:
    """Start the run of a claimed batch; return its id. A repeat finds the run that was started."""
    run = await arun_deployment(
        ADAPT,
        parameters={"lineage": lineage},
        timeout=0,
        idempotency_key=f"{batch.id}:{batch.attempt}",
        as_subflow=False,
    )
    return str(run.id)
