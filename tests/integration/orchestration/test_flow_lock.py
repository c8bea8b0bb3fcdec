"""With a Prefect server, the server and the home both allow one run per lineage at a time."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.lock import LineageBusyError, lock_lineage

pytestmark = pytest.mark.usefixtures("prefect_api", "home")


async def limit_of(lineage: str) -> tuple[int, int]:
    async with get_client() as client:
        found = await client.read_global_concurrency_limit_by_name(f"lineage-{lineage}")
        return found.limit, found.active_slots


def test_the_limit_is_made_held_and_given_back() -> None:
    async def flow() -> None:
        async with lock_lineage("server-lock"):
            assert await limit_of("server-lock") == (1, 1)
        assert await limit_of("server-lock") == (1, 0)

    asyncio.run(flow())


def test_a_run_that_began_before_the_server_keeps_the_servers_runs_off() -> None:
    async def flow() -> None:
        async with AsyncExitStack() as stack:
            with temporary_settings(restore_defaults={PREFECT_API_URL}):
                await stack.enter_async_context(lock_lineage("server-later"))
            with pytest.raises(LineageBusyError):
                async with lock_lineage("server-later", wait=False):
                    pass
        async with lock_lineage("server-later", wait=False):
            assert await limit_of("server-later") == (1, 1)

    asyncio.run(flow())
