"""Remove what nobody will need again: work folders, rejected adapters, training rows and files that a crash left."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

from prefect import flow
from pydantic import BaseModel

from deal_core.errors import ConfigError, DealError
from flows.lock import LineageBusyError, hold_lineage
from infra.tracking.registry import open_registry
from infra.tracking.runs import ArtifactRemover
from infra.tracking.tracker import open_tracker
from tasks.context import current_store
from tasks.housekeeping.garbage import Removal, plan_removals
from tasks.housekeeping.inventory import (
    list_all_lineages,
    look_at_lineage,
    old_temporaries,
    old_training_rows,
    remove,
    with_model_bytes,
)
from tasks.progress import raise_if_stopped, reporter

UNITS = {"h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}


class GcResult(BaseModel, frozen=True):
    """What was removed, or would be."""

    dry_run: bool
    removals: tuple[Removal, ...]
    num_bytes: int
    busy: tuple[str, ...]
    """Lineages that a run was working on; nothing of them was looked at."""
    problems: dict[str, str] = {}
    """Lineages that could not be looked at, or not be done with, and why."""


@flow(name="gc")
async def gc(lineage: str | None = None, older_than: str = "30d", dry_run: bool = False) -> GcResult:
    """Remove garbage, lineage by lineage, each while nobody works on it. One with a problem does not stop the others.

    Args:
        lineage: only this one; None: all, and what no lineage owns.
        older_than: age of what may go, such as 12h, 30d or 4w.
        dry_run: only say what would be removed.

    Raises:
        ConfigError: the age cannot be read.
    """
    limit, now = parse_age(older_than), datetime.now(UTC)
    store, registry, tracker = current_store(), open_registry(), open_tracker()
    known = list_all_lineages(store)
    if lineage is not None and lineage not in known:
        raise ConfigError(f"Lineage {lineage!r} has left nothing here; known are: {', '.join(known) or 'none'}.")
    remover = ArtifactRemover(tracker)
    removals: list[Removal] = []
    busy: list[str] = []
    problems: dict[str, str] = {}

    def go_through(plan: tuple[Removal, ...]) -> None:
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
                go_through(plan_removals(held, now=now, older_than=limit))
        except LineageBusyError as error:
            reporter().said(f"{error} It was left alone.")
            busy.append(name)
        except DealError as error:
            reporter().said(f"Lineage '{name}': {error}")
            problems[name] = str(error)
    if lineage is None:
        go_through(old_training_rows(store, now=now, older_than=limit))
        go_through(old_temporaries(store, now=now))
    return GcResult(
        dry_run=dry_run,
        removals=tuple(removals),
        num_bytes=sum(removal.num_bytes for removal in removals),
        busy=tuple(busy),
        problems=problems,
    )


def parse_age(text: str) -> timedelta:
    """A number of hours, days or weeks.

    Raises:
        ConfigError: it is none.

    Example:
        >>> parse_age("30d").days
        30
    """
    found = re.fullmatch(r"(\d{1,5})([hdw])", text.strip())
    if found is None:
        raise ConfigError(f"The age is {text!r}; give hours, days or weeks, such as 12h, 30d or 4w.")
    return int(found[1]) * UNITS[found[2]]
