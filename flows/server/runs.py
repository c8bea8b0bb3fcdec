"""The runs on the Prefect server, for `deal status` and `deal up`."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import httpx
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas import filters
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import PrefectException
from prefect.settings import get_current_settings

from deal_core.errors import in_one_line
from deal_core.safe_text import without_secrets
from flows.server.run_status import NEWEST, RunStatus, ServerRuns

DAY = timedelta(days=1)


async def read_server(problems: list[str]) -> ServerRuns:
    """Read the runs on the Prefect server. A server that does not answer is appended to `problems`."""
    api = get_current_settings().api.url
    if not api:
        return ServerRuns()
    running: list[RunStatus] = []
    waiting: list[RunStatus] = []
    failed: list[RunStatus] = []
    try:
        async with get_client() as client:
            running = await _newest(client, [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING])
            scheduled = await _newest(client, [StateType.SCHEDULED])
            waiting = [run for run in scheduled if run.since <= datetime.now(UTC)]
            failed = await _newest(client, [StateType.FAILED, StateType.CRASHED], since=datetime.now(UTC) - DAY)
    except (httpx.HTTPError, PrefectException, RuntimeError) as error:
        problems.append(without_secrets(f"Prefect at {api} does not answer: {in_one_line(error)}"))
    return ServerRuns(
        url=without_secrets(api.removesuffix("/api")), running=running, waiting=waiting, failed=failed
    )  # fmt: skip


async def read_runs(
    client: PrefectClient, states: list[StateType], since: datetime | None = None, limit: int | None = None
) -> list[FlowRun]:
    """Read the runs of this project's deployments that are in these states and started after `since`, newest first."""
    return await client.read_flow_runs(
        flow_run_filter=filters.FlowRunFilter(
            state=filters.FlowRunFilterState(type=filters.FlowRunFilterStateType(any_=states)),
            start_time=filters.FlowRunFilterStartTime(after_=since) if since else None,
        ),
        deployment_filter=filters.DeploymentFilter(tags=filters.DeploymentFilterTags(all_=["deal"])),
        sort=FlowRunSort.START_TIME_DESC, limit=limit,
    )  # fmt: skip


async def _newest(client: PrefectClient, states: list[StateType], since: datetime | None = None) -> list[RunStatus]:
    found = []
    for run in await read_runs(client, states, since, NEWEST):
        state = run.state
        found.append(
            RunStatus(
                name=run.name, state=state.name or state.type.value if state else "unknown",
                since=run.start_time or run.expected_start_time or datetime.now(UTC),
                message=without_secrets(state.message or "") if state else "", run_id=str(run.id),
            )
        )  # fmt: skip
    return found
