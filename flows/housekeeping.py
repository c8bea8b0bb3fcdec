"""Housekeeping: forget the rows of an arrival, and remove files that are no longer needed."""

from __future__ import annotations

import re
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta

from prefect import flow
from pydantic import BaseModel

from deal_core.errors import ConfigError, DealError
from flows.lock import LineageBusyError, hold_lineage
from infra.store.keys import parse_dataset_file
from infra.tracking.registry import open_registry
from infra.tracking.runs import ArtifactRemover
from infra.tracking.tracker import open_tracker
from tasks.context import current_store
from tasks.housekeeping.forgetting import ForgetPlan, forget_held, plan_forgetting, silence_watches
from tasks.housekeeping.garbage import Removal, plan_removals
from tasks.housekeeping.inventory import (
    find_arrival,
    list_all_lineages,
    look_at_lineage,
    old_temporaries,
    old_training_rows,
    remove,
    with_model_bytes,
)
from tasks.lineage.tombstones import Tombstone, put_tombstone
from tasks.progress import raise_if_stopped, reporter

UNITS = {"h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}


class ForgetResult(BaseModel, frozen=True):
    """What was removed. The weights of the versions in the plan still contain what they learned."""

    plan: ForgetPlan
    tombstone: Tombstone


class GcResult(BaseModel, frozen=True):
    """What was removed, or would be removed."""

    dry_run: bool
    removals: tuple[Removal, ...]
    num_bytes: int
    busy: tuple[str, ...]
    """Lineages that were skipped because a run works on them."""
    problems: dict[str, str] = {}
    """Lineages that failed, and why."""


def plan_forget(named: str) -> ForgetPlan:
    """Return what `forget` would remove; change nothing.

    Args:
        named: Digest of the dataset, its first characters, or the key under which the arrival landed.

    Raises:
        ConfigError: There is no such arrival, or more than one.
    """
    store, registry = current_store(), open_registry()
    return plan_forgetting(store, registry, open_tracker(), find_arrival(store, registry, named))


@flow(name="forget")
async def forget(named: str, reason: str = "") -> ForgetResult:
    """Remove an arrival's rows from all places and splits.

    The tombstone is written first, so that a run that begins now refuses the rows. Then the affected lineages are held;
    a run that works on one of them is waited for. If this call is interrupted, repeat it with the same argument.

    Args:
        named: As for `plan_forget`.
        reason: Reason for the history. It must not quote any rows.

    Raises:
        ConfigError: There is no such arrival, or more than one.
    """
    store, registry, tracker = current_store(), open_registry(), open_tracker()
    arrival = find_arrival(store, registry, named)
    plan = plan_forgetting(store, registry, tracker, arrival)
    put_tombstone(store, _tombstone(plan, reason))
    async with AsyncExitStack() as stack:
        for lineage in _affected(plan):
            await stack.enter_async_context(hold_lineage(lineage))
        plan = plan_forgetting(store, registry, tracker, arrival)  # a run that has ended may have added data
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


def _affected(plan: ForgetPlan) -> list[str]:
    """Return the lineages that have rows of the arrival or learned from it."""
    files = [parse_dataset_file(each.address) for each in plan.held]
    owners = {each.lineage for each in files if each and each.lineage}
    named = {each.lineage for each in plan.held if each.lineage} | {each.lineage for each in plan.learned}
    return sorted(named | owners | set(plan.unjudged))


@flow(name="gc")
async def gc(lineage: str | None = None, older_than: str = "30d", dry_run: bool = False) -> GcResult:
    """Remove old work folders, rejected adapters, training rows and temporary files of crashed processes.

    Each lineage is held while its files are removed. A problem with one lineage does not stop the others.

    Args:
        lineage: Only this lineage; None: all lineages, and files that belong to no lineage.
        older_than: Least age of removed files, such as 12h, 30d or 4w.
        dry_run: Remove nothing; only report.

    Raises:
        ConfigError: The age cannot be read, or there is no such lineage.
    """
    limit, now = parse_age(older_than), datetime.now(UTC)
    store, registry, tracker = current_store(), open_registry(), open_tracker()
    known = list_all_lineages(store)
    if lineage is not None and lineage not in known:
        raise ConfigError(f"There is no lineage {lineage!r} here; known are: {', '.join(known) or 'none'}.")
    remover = ArtifactRemover(tracker)
    removals: list[Removal] = []
    busy: list[str] = []
    problems: dict[str, str] = {}

    def apply(plan: tuple[Removal, ...]) -> None:
        for planned in plan:
            raise_if_stopped()
            removal = with_model_bytes(planned, remover)
            if not dry_run:
                remove(store, remover, removal, now)
            removals.append(removal)

    for name in known if lineage is None else (lineage,):
        try:
            async with hold_lineage(name, wait=False):
                held = look_at_lineage(store, registry, tracker, name)
                apply(plan_removals(held, now=now, older_than=limit))
        except LineageBusyError as error:
            reporter().said(f"{error} The lineage was skipped.")
            busy.append(name)
        except DealError as error:
            reporter().said(f"Lineage '{name}': {error}")
            problems[name] = str(error)
    if lineage is None:
        apply(old_training_rows(store, now=now, older_than=limit))
        apply(old_temporaries(store, now=now))
    num_bytes = sum(removal.num_bytes for removal in removals)
    return GcResult(
        dry_run=dry_run, removals=tuple(removals), num_bytes=num_bytes, busy=tuple(busy), problems=problems
    )


def parse_age(text: str) -> timedelta:
    """Read a number of hours, days or weeks.

    Raises:
        ConfigError: The text has another form.

    Example:
        >>> parse_age("30d").days
        30
    """
    found = re.fullmatch(r"(\d{1,5})([hdw])", text.strip())
    if found is None:
        raise ConfigError(f"The age is {text!r}; give hours, days or weeks, such as 12h, 30d or 4w.")
    return int(found[1]) * UNITS[found[2]]
