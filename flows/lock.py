"""One run per lineage at a time, whether the runs share a home folder or a Prefect server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext

import httpx
from filelock import FileLock, Timeout
from prefect.client.orchestration import get_client
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError, concurrency
from prefect.exceptions import ObjectNotFound
from prefect.settings import get_current_settings

from deal_core.errors import DealError
from infra.settings import HomeSettings, LockSettings
from tasks.progress import patient, raise_if_stopped, reporter

LOOK_SECONDS = 0.5
LOCKED = 423


class LineageBusyError(DealError):
    """Another run works on the lineage, and the caller did not want to wait."""


@asynccontextmanager
async def hold_lineage(lineage: str, *, wait: bool = True) -> AsyncIterator[None]:
    """Keep other runs off the lineage.

    First by a file lock under the home folder, which ends with its process and is all there is without a server. With
    one also by a global concurrency limit of 1: made first, since a limit that is missing would protect nothing. The
    file is locked all the same, as a run that began before the server did may be at work in this home.

    Args:
        lineage: its name.
        wait: until no other run works on it.

    Raises:
        LineageBusyError: with `wait` off, another run works on it.
    """
    has_server = bool(get_current_settings().api.url)
    async with _hold_in_home(lineage, wait), _hold_on_server(lineage, wait) if has_server else nullcontext():
        yield


@patient
async def is_held_on_server(lineage: str) -> bool:
    """Whether a run works on the lineage, as far as the Prefect server knows."""
    async with get_client() as client:
        try:
            limit = await client.read_global_concurrency_limit_by_name(_limit_name(lineage))
        except ObjectNotFound:
            return False
        return limit.active_slots > 0


@asynccontextmanager
async def _hold_in_home(lineage: str, wait: bool) -> AsyncIterator[None]:
    path = HomeSettings().home / "locks" / f"{lineage}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    waits = False
    while not lock.is_locked:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not wait:
                raise LineageBusyError(f"Lineage '{lineage}' is at work in another process.") from None
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
async def _hold_on_server(lineage: str, wait: bool) -> AsyncIterator[None]:
    name = _limit_name(lineage)
    await _make_limit(name)
    async with AsyncExitStack() as stack:
        waits = False
        while not await _enter(stack, name):
            if not wait:
                raise LineageBusyError(f"Lineage '{lineage}' is at work in another run.")
            if not waits:
                reporter().said(f"Lineage '{lineage}' is at work in another run; waiting for it.")
            waits = True
            raise_if_stopped()
            await asyncio.sleep(LOOK_SECONDS * 4)
        yield


@patient
async def _enter(stack: AsyncExitStack, name: str) -> bool:
    """Take the slot if it is free; return whether it was.

    A run that loses it later ends, lest two work on one lineage, and goes on from its checkpoint when it starts again.
    """
    slot = concurrency(
        name, strict=True, max_retries=0, lease_duration=LockSettings().lease_seconds,
        raise_on_lease_renewal_failure=True,
    )  # fmt: skip
    try:
        await stack.enter_async_context(slot)
    except ConcurrencySlotAcquisitionError as error:
        if isinstance(error.__cause__, httpx.TransportError):
            raise error.__cause__ from None
        answer = getattr(error.__cause__, "response", None)
        if answer is None or answer.status_code != LOCKED:
            raise
        return False
    return True


@patient
async def _make_limit(name: str) -> None:
    async with get_client() as client:
        await client.upsert_global_concurrency_limit_by_name(name, limit=1)


def _limit_name(lineage: str) -> str:
    return f"lineage-{lineage}"
