"""Rebuild: a lineage that MLflow has lost is registered again from the store, while nobody else works on it."""

from __future__ import annotations

import asyncio

from flows.lock import hold_lineage
from tasks.rebuild import RebuildResult, rebuild_lineage


async def rebuild(lineage: str) -> RebuildResult:
    """Register a lineage's versions again; see `tasks.rebuild.rebuild_lineage`.

    Raises:
        LineageBusyError: a run works on the lineage.
    """
    async with hold_lineage(lineage, wait=False):
        return await asyncio.to_thread(rebuild_lineage, lineage)
