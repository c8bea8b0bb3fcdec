"""What `deal up` does with the runs that the workers before left."""

from __future__ import annotations

import asyncio

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.states import Running

from flows.server.up import _restart_what_was_left

pytestmark = pytest.mark.usefixtures("prefect_api")


def test_only_runs_that_may_be_done_twice_start_again() -> None:
    async def states() -> dict[str, StateType]:
        found = {}
        async with get_client() as client:
            runs = {}
            for name in ("adapt", "rollback"):
                flow = await client.create_flow_from_name(name)
                deployment = await client.create_deployment(flow, name, tags=["deal"])
                runs[name] = (await client.create_flow_run_from_deployment(deployment)).id
                await client.set_flow_run_state(runs[name], Running(), force=True)
            await _restart_what_was_left(client)
            for name, run in runs.items():
                state = (await client.read_flow_run(run)).state
                assert state and state.message and state.message.startswith("Its worker was ended")
                found[name] = state.type
        return found

    assert asyncio.run(states()) == {"adapt": StateType.SCHEDULED, "rollback": StateType.CRASHED}
