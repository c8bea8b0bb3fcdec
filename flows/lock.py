"""Only one run works on a lineage at a time, even if runs share only a home folder or only a Prefect server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext, suppress

import httpx
from filelock import FileLock, Timeout
from prefect.client.orchestration import get_client
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError, concurrency
from prefect.exceptions import ObjectNotFound
from prefect.settings import get_current_settings

from deal_core.errors import DealError
from infra.settings import LockSettings
from tasks.context import lineage_lock
from tasks.progress import patient, raise_if_stopped, reporter

LOOK_SECONDS = 0.5
LOCKED = 423


class LineageBusyError(DealError):
    """Another run works on the lineage, and the caller does not wait."""

    code = "lineage-busy"


@asynccontextmanager
async def lock_lineage(lineage: str, *, wait: bool = True) -> AsyncIterator[None]:
    """Hold the lineage, so that no other run works on it.

    A file lock in the home folder holds the lineage. It ends with the process. With a Prefect server, a global
    concurrency limit of 1 holds the lineage too. The file lock is still needed then: a run that began before the server
    started may work in this home.

    Raises:
        LineageBusyError: Without `wait`, another run works on the lineage.
    """
    has_server = bool(get_current_settings().api.url)
    async with _hold_in_home(lineage, wait), _hold_on_server(lineage, wait) if has_server else nullcontext():
        yield


@patient
async def is_locked(lineage: str) -> bool:
    """Return whether a process of this home or a run on the Prefect server holds the lineage."""
    try:
        with FileLock(lineage_lock(lineage)).acquire(timeout=0):
            pass
    except Timeout:
        return True
    async with get_client() as client:
        try:
            limit = await client.read_global_concurrency_limit_by_name(_limit_name(lineage))
        except ObjectNotFound:
            return False
        return limit.active_slots > 0


@asynccontextmanager
async def _hold_in_home(lineage: str, wait: bool) -> AsyncIterator[None]:
    lock = FileLock(lineage_lock(lineage))

    async def take() -> bool:
        with suppress(Timeout):
            lock.acquire(timeout=0)
        return lock.is_locked

    await _take_or_wait(take, lineage, "Another process", wait, LOOK_SECONDS)
    try:
        yield
    finally:
        lock.release()


@asynccontextmanager
async def _hold_on_server(lineage: str, wait: bool) -> AsyncIterator[None]:
    name = _limit_name(lineage)
    await _make_limit(name)  # a missing limit would not block other runs
    async with AsyncExitStack() as stack:
        await _take_or_wait(lambda: _enter(stack, name), lineage, "Another run", wait, LOOK_SECONDS * 4)
        yield


async def _take_or_wait(
    take: Callable[[], Awaitable[bool]], lineage: str, holder: str, wait: bool, pause: float
) -> None:
    """Call `take` until it returns True, with pauses of `pause` seconds. Without `wait`, call it only once."""
    is_told = False
    while not await take():
        if not wait:
            raise LineageBusyError(f"{holder} works on lineage '{lineage}'.")
        if not is_told:
            reporter().said(f"{holder} works on lineage '{lineage}'; waiting for its end.")
        is_told = True
        raise_if_stopped()
        await asyncio.sleep(pause)


@patient
async def _enter(stack: AsyncExitStack, name: str) -> bool:
    """Take the slot if it is free. Return whether it was free.

    A run that loses the slot later ends, so that two runs never work on one lineage. When it is started again, it
    continues from its checkpoint.
    """
    slot = concurrency(
        name,
        strict=True,
        max_retries=0,
        lease_duration=LockSettings().lease_seconds,
        raise_on_lease_renewal_failure=True,
    )
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
