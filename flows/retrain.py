"""Retrain: ask the settings `retrain` of every lineage, and start what is due."""

from __future__ import annotations

from datetime import datetime

from prefect import flow

from flows.watch import announce_all
from tasks.context import current_store


@flow(name="retrain")
async def retrain(settle_seconds: float = 2.0, now: datetime | None = None) -> int:
    """Announce what is due for every lineage, so that the server starts its runs; return the number of announcements.

    A lineage that is being learned is not started again: the run that holds it decides again before it ends. What was
    announced and has no run is announced again, with growing pauses.

    Args:
        settle_seconds: A file that has changed within this time may still be written, and waits for the next look.
        now: The time by which the settings decide; None: that of the clock.
    """
    found = await announce_all(current_store(), {}, settle_seconds, now)
    return found.num_announced
