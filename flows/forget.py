"""Forget: remove the rows of an arrival from all places, and name the versions that learned from them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime

from prefect import flow
from pydantic import BaseModel

from flows.lock import lock_lineage
from infra.deleted_inputs import keep_deleted
from infra.log_batches import BATCH_SECONDS
from infra.store import keys
from infra.store.base import ObjectStore
from infra.store.keys import parse_dataset_file, top_of
from infra.store.opening import open_store
from tasks.housekeeping.arrivals import KnownArrival, find_arrival
from tasks.housekeeping.forgetting import ForgetPlan, forget_held, plan_forgetting, silence_notes
from tasks.housekeeping.garbage import list_logged_lineages
from tasks.lineage.tombstones import Tombstone, put_tombstone
from tasks.mlflow_mirror import sync_lineage
from tasks.progress import to_the_end


class ForgetResult(BaseModel, frozen=True):
    """What was removed. The weights of the versions in the plan still contain what they learned."""

    plan: ForgetPlan
    tombstone: Tombstone
    waits_for_mlflow: tuple[str, ...] = ()
    """Lineages whose reports in MLflow may still quote the rows, because MLflow did not answer."""


def plan_forget(store: ObjectStore, named: str) -> ForgetPlan:
    """Return what `forget_arrival` would remove; change nothing.

    Args:
        store: The store, which has the arrival.
        named: Digest of the dataset, its first characters, or the key under which the arrival landed.
    """
    return plan_forgetting(store, find_arrival(store, named))


async def forget_arrival(named: str, reason: str = "") -> ForgetResult:
    """Remove an arrival's rows from all places and splits.

    A first look at all places changes nothing, so a refusal leaves the store as it was. Then the digests of the inputs
    and the tombstone are written: a run that begins now refuses the rows, and no server logs their texts. Then the
    affected lineages are held; a run that works on one of them is waited for. What is removed is looked for only now.
    If such a run has spread the rows to another lineage, that lineage is held too. If this call is interrupted, repeat
    it with the same argument.

    MLflow's copies of reports are removed last. If MLflow is away, the next run or `deal server sync` removes them.

    Args:
        named: As for `plan_forget`.
        reason: Reason for the history. It must not quote any rows.

    Raises:
        ConfigError: There is no such arrival, or more than one.
        StoreError: The store does not answer, or a version, a journal or rows in it are damaged.
    """
    store = open_store()
    arrival = find_arrival(store, named)
    plan = plan_forgetting(store, arrival)
    _note(store, arrival, plan, reason)
    while True:
        held = _affected(plan)
        async with AsyncExitStack() as stack:
            for lineage in held:
                await stack.enter_async_context(lock_lineage(lineage))
            if list_logged_lineages(store):  # a server may hold rows that wait
                await asyncio.sleep(2 * BATCH_SECONDS)  # until they have stored the answers that they gave before
            plan = plan_forgetting(store, arrival)  # a run that has ended may have added data
            if set(_affected(plan)) <= set(held):
                versions = [f"{version.lineage}/{version.version}" for version in plan.learned]
                tombstone = _note(store, arrival, plan, reason, versions)
                silence_notes(store, _inbox_keys(arrival, plan), f"Its rows were {tombstone.said}.")
                forget_held(store, plan)
                for lineage in held:
                    await to_the_end(sync_lineage, store, lineage)
                waiting = tuple(lineage for lineage in held if any(store.list(keys.mlflow_forget_folder(lineage))))
                return ForgetResult(plan=plan, tombstone=tombstone, waits_for_mlflow=waiting)


forget = flow(name="forget")(forget_arrival)
"""The same as a flow."""


def _note(
    store: ObjectStore, arrival: KnownArrival, plan: ForgetPlan, reason: str, versions: Sequence[str] = ()
) -> Tombstone:
    """Write down what is deleted. From now on servers log no text of the rows, and runs refuse them."""
    keep_deleted(store, plan.task, plan.sha256, plan.inputs)
    tombstone = Tombstone(
        **plan.model_dump(include={"task", "sha256", "files", "splits", "landed", "unknown"}),
        reason=reason,
        at=datetime.now(UTC),
        versions=tuple(versions),
        inbox_keys=_inbox_keys(arrival, plan),
    )
    return put_tombstone(store, tombstone)


def _inbox_keys(arrival: KnownArrival, plan: ForgetPlan) -> tuple[str, ...]:
    landed = {top_of(place.address) for place in plan.held if place.kind == "inbox file"} | {arrival.key}
    return tuple(sorted(filter(None, landed)))


def _affected(plan: ForgetPlan) -> list[str]:
    """Return the lineages that have rows of the arrival or learned from it."""
    owners = {file.lineage for held in plan.held if (file := parse_dataset_file(held.address))}
    named = {held.lineage for held in plan.held if held.lineage} | {version.lineage for version in plan.learned}
    return sorted(named | owners | set(plan.unjudged))
