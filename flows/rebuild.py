"""Rebuild: a lineage that MLflow has lost is registered again from the store, while nobody else works on it."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from prefect import flow

from flows.lock import hold_lineage
from tasks.lineage.rebuild import RebuildResult, rebuild_lineage
from tasks.progress import Interrupted, ask_to_stop, raise_if_stopped


@flow(name="rebuild", flow_run_name="rebuild-{lineage}")
async def rebuild(lineage: str) -> RebuildResult:
    """Register a lineage's versions again; see `tasks.lineage.rebuild`. Cancelled, it ends at the next version.

    Raises:
        LineageBusyError: a run works on the lineage.
    """
    raise_if_stopped()  # from here on the thread shares what asks it to stop
    async with hold_lineage(lineage, wait=False):
        working = asyncio.create_task(asyncio.to_thread(rebuild_lineage, lineage))
        try:
            return await asyncio.shield(working)
        except asyncio.CancelledError:
            ask_to_stop()
            with suppress(Interrupted):
                await working
            raise
