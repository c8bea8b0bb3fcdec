"""Forget an arrival: its rows go, a tombstone stays, and every version that learned from it is named."""

from __future__ import annotations

from contextlib import AsyncExitStack
from datetime import UTC, datetime

from prefect import flow
from pydantic import BaseModel

from flows.lock import hold_lineage
from infra.store.keys import parse_dataset_file
from infra.tracking.registry import open_registry
from infra.tracking.runs import ArtifactRemover
from infra.tracking.tracker import open_tracker
from tasks.context import current_store
from tasks.housekeeping.forgetting import ForgetPlan, forget_held, plan_forgetting, silence_watches
from tasks.housekeeping.inventory import find_arrival
from tasks.lineage.tombstones import Tombstone, put_tombstone


class ForgetResult(BaseModel, frozen=True):
    """What was removed; the versions named in the plan still hold in their weights what they learned."""

    plan: ForgetPlan
    tombstone: Tombstone


def plan_forget(named: str) -> ForgetPlan:
    """What forgetting an arrival would remove; nothing is changed.

    Args:
        named: digest of the dataset, its first characters, or the key under which it landed.

    Raises:
        ConfigError: there is no such arrival, or more than one.
    """
    store, registry = current_store(), open_registry()
    return plan_forgetting(store, registry, open_tracker(), find_arrival(store, registry, named))


@flow(name="forget")
async def forget(named: str, reason: str = "") -> ForgetResult:
    """Remove an arrival's rows wherever they lie, however they were split.

    The tombstone comes first, so that a run which begins meanwhile refuses the rows; then the lineages that have to do
    with them are held, one that is at work is waited for. A call that was cut short is repeated with the same argument.

    Args:
        named: as for `plan_forget`.
        reason: why, for the history; never put anything of the rows into it.

    Raises:
        ConfigError: there is no such arrival, or more than one.
    """
    store, registry, tracker = current_store(), open_registry(), open_tracker()
    arrival = find_arrival(store, registry, named)
    plan = plan_forgetting(store, registry, tracker, arrival)
    tombstone = _tombstone(plan, reason)
    put_tombstone(store, tombstone)
    async with AsyncExitStack() as stack:
        for lineage in _concerned(plan):
            await stack.enter_async_context(hold_lineage(lineage))
        plan = plan_forgetting(store, registry, tracker, arrival)  # a run that was waited for may have added to it
        put_tombstone(store, tombstone := _tombstone(plan, reason))
        keys = {each.address for each in plan.held if each.kind == "inbox file"} | {arrival.key}
        forget_held(store, ArtifactRemover(tracker), plan, registry)
        silence_watches(store, {key for key in keys if key}, f"Its rows were {tombstone.said}.")
    return ForgetResult(plan=plan, tombstone=tombstone)


def _tombstone(plan: ForgetPlan, reason: str) -> Tombstone:
    return Tombstone(
        task=plan.task, sha256=plan.sha256, files=plan.files, splits=plan.splits, landed=plan.landed, reason=reason,
        at=datetime.now(UTC), versions=tuple(f"{each.lineage}/{each.version}" for each in plan.learned),
    )  # fmt: skip


def _concerned(plan: ForgetPlan) -> list[str]:
    files = [parse_dataset_file(each.address) for each in plan.held]
    owners = {each.lineage for each in files if each and each.lineage}
    named = {each.lineage for each in plan.held if each.lineage} | {each.lineage for each in plan.learned}
    return sorted(named | owners | set(plan.unjudged))


