"""Garbage collection: remove old files that are no longer needed."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

from prefect import flow, runtime
from pydantic import BaseModel

from deal_core.errors import ConfigError, DealError
from flows.lock import LineageBusyError, lock_lineage
from infra.disk import disk_full
from infra.settings import ServingSettings
from infra.store.opening import open_store
from tasks.housekeeping import garbage
from tasks.housekeeping.garbage import Removal
from tasks.progress import raise_if_stopped, reporter

UNITS = {"h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}


class GcResult(BaseModel, frozen=True):
    """What was removed, or would be removed."""

    dry_run: bool
    """Whether nothing was removed, only listed."""
    removals: tuple[Removal, ...]
    num_bytes: int
    """Size of all removals together."""
    busy: tuple[str, ...]
    """Lineages that were skipped because a run works on them."""
    problems: dict[str, str] = {}
    """Lineages that failed, and why."""


async def collect_garbage(lineage: str | None = None, older_than: str = "30d", dry_run: bool = False) -> GcResult:
    """Remove old work folders, rejected adapters, training rows, logs, and temporary files of killed processes.

    Logs are removed after DEAL_LOG_RETENTION_DAYS of this machine, and the small batches of younger logs are joined.
    Each lineage is locked while its other files are removed. A problem with one lineage does not stop the others.

    Args:
        lineage: Only this lineage; None: all lineages, and files that belong to no lineage.
        older_than: Least age of removed files, such as 12h, 30d or 4w.
        dry_run: Remove nothing; only report.

    Raises:
        ConfigError: The age cannot be read, or there is no such lineage.
        DealError: In a run of a server: not everything could be removed.
    """
    limit, now = parse_age(older_than), datetime.now(UTC)
    store = open_store()
    known, logged = garbage.list_all_lineages(store), garbage.list_logged_lineages(store)
    if lineage is not None and lineage not in {*known, *logged}:
        raise ConfigError(f"There is no lineage {lineage!r} here; known are: {', '.join(known) or 'none'}.")
    removals: list[Removal] = []
    busy: list[str] = []
    problems: dict[str, str] = {}

    def apply(plan: tuple[Removal, ...]) -> None:
        for removal in plan:
            raise_if_stopped()
            if not dry_run:
                garbage.remove(store, removal, now)
            removals.append(removal)

    if lineage is None:  # first, since removing them writes nothing
        apply(garbage.old_temporaries(store, now=now))
    for name in sorted({*known, *logged}) if lineage is None else [lineage]:
        try:
            apply(garbage.old_logs(store, name, now=now, days=ServingSettings().log_retention_days))
            async with lock_lineage(name, wait=False):
                if name in known:
                    inventory = garbage.look_at_lineage(store, name)
                    apply(garbage.plan_removals(inventory, now=now, older_than=limit))
                if not dry_run:
                    try:
                        garbage.merge_logs(store, name)
                    except (DealError, OSError) as error:  # without room for the joined ones, the small ones stay
                        if disk_full(error) is None:
                            raise
        except LineageBusyError as error:
            reporter().said(f"{error} The lineage was skipped.")
            busy.append(name)
        except (DealError, OSError) as error:
            reporter().said(f"Lineage '{name}': {error}")
            problems[name] = str(error)
    if problems and runtime.deployment.id:  # the run is to be red, so that people see it; the command has an exit code
        raise DealError(" ".join(f"Lineage '{name}': {problem}" for name, problem in problems.items()))
    num_bytes = sum(removal.num_bytes for removal in removals)
    return GcResult(dry_run=dry_run, removals=tuple(removals), num_bytes=num_bytes, busy=tuple(busy), problems=problems)


gc = flow(name="gc")(collect_garbage)
"""The same as a flow."""


def parse_age(text: str) -> timedelta:
    """Read a number of hours, days or weeks.

    Raises:
        ConfigError: The text has another form.

    Example:
        >>> parse_age("30d").days
        30
    """
    match = re.fullmatch(r"(\d{1,5})([hdw])", text.strip())
    if match is None:
        raise ConfigError(f"The age is {text!r}; give hours, days or weeks, such as 12h, 30d or 4w.")
    return int(match[1]) * UNITS[match[2]]
