"""One run per lineage at a time, whether the runs share a machine or a Prefect server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from filelock import FileLock, Timeout
from prefect.client.orchestration import get_client
from prefect.concurrency.asyncio import concurrency
from prefect.settings import get_current_settings

from infra.settings import HomeSettings
from tasks.progress import raise_if_stopped, reporter

LOOK_SECONDS = 0.5


@asynccontextmanager
async def hold_lineage(lineage: str) -> AsyncIterator[None]:
    """Wait until no other run works on the lineage, and keep others out.

    Without a server this is a file lock under the home folder, which ends with its process. With one it is a global
    concurrency limit of 1: made first, since a limit that is missing would protect nothing.
    """
    holder = _hold_on_server(lineage) if get_current_settings().api.url else _hold_on_machine(lineage)
    async with holder:
        yield


@asynccontextmanager
async def _hold_on_machine(lineage: str) -> AsyncIterator[None]:
    path = HomeSettings().home / "locks" / f"{lineage}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    waits = False
    while not lock.is_locked:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not waits:
                reporter().said(f"Lineage '{lineage}' is at work in another process; waiting for it.")
            waits = True
            raise_if_stopped()
            await asyncio.sleep(LOOK_SECONDS)
    try:
        yield
    finally:
        lock.release()


@asynccontextmanager
async def _hold_on_server(lineage: str) -> AsyncIterator[None]:
    name = f"lineage-{lineage}"
    async with get_client() as client:
        await client.upsert_global_concurrency_limit_by_name(name, limit=1)
    # A renewal that fails while the server restarts must not end hours of training; the lease outlives a short outage.
    async with concurrency(name, strict=True, raise_on_lease_renewal_failure=False):
        yield
