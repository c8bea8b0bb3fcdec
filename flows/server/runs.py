"""The runs on the Prefect server, for `deal status` and `deal up`.

Prefect is imported only where a server may be named, because the import takes a second of processor time.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel

from deal_core.errors import in_one_line
from deal_core.safe_text import without_secrets

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.objects import FlowRun, StateType

NEWEST = 20
"""Runs of each kind, and files, that are shown."""
DAY = timedelta(days=1)


class RunStatus(BaseModel, frozen=True):
    """A run on the Prefect server."""

    name: str
    state: str
    since: datetime
    message: str
    run_id: str


class ServerRuns(BaseModel, frozen=True):
    """The runs on the Prefect server; without a server none."""

    url: str | None = None
    running: tuple[RunStatus, ...] = ()
    waiting: tuple[RunStatus, ...] = ()
    failed: tuple[RunStatus, ...] = ()
    """Failed runs of the last 24 hours, newest first."""


def may_name_a_server(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether anything may name a Prefect server: a variable, or a file that Prefect reads.

    Prefect itself says which server it is. It is asked only if this function returns True, or if it is imported anyway.
    """
    home = environment.get("PREFECT_HOME")
    if "prefect" in sys.modules or home is None:
        return True
    if any(environment.get(name) for name in ("PREFECT_API_URL", "PREFECT_PROFILE", "PREFECT_PROFILES_PATH")):
        return True
    if any(path.exists() for path in (Path(".env"), Path("prefect.toml"), Path(home).expanduser() / "profiles.toml")):
        return True
    project = Path("pyproject.toml")
    return project.is_file() and re.search(r"\btool\.prefect\b", project.read_text(errors="replace")) is not None


async def read_server(problems: list[str]) -> ServerRuns:
    """Read the runs on the Prefect server, if there is one. One that does not answer is appended to `problems`."""
    if not may_name_a_server():
        return ServerRuns()
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.objects import StateType
    from prefect.exceptions import PrefectException
    from prefect.settings import get_current_settings

    api = get_current_settings().api.url
    if not api:
        return ServerRuns()
    now = datetime.now(UTC)
    running: list[RunStatus] = []
    waiting: list[RunStatus] = []
    failed: list[RunStatus] = []
    try:
        async with get_client() as client:
            running = await _newest(client, [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING])
            waiting = [run for run in await _newest(client, [StateType.SCHEDULED]) if run.since <= now]
            failed = await _newest(client, [StateType.FAILED, StateType.CRASHED], since=now - DAY)
    except (httpx.HTTPError, PrefectException, RuntimeError) as error:
        problems.append(without_secrets(f"Prefect at {api} does not answer: {in_one_line(error)}"))
    return ServerRuns(url=without_secrets(api.removesuffix("/api")), running=running, waiting=waiting, failed=failed)


async def read_runs(
    client: PrefectClient, states: list[StateType], since: datetime | None = None, limit: int | None = None
) -> list[FlowRun]:
    """Read the runs of this project's deployments that are in these states and started after `since`, newest first."""
    from prefect.client.schemas import filters
    from prefect.client.schemas.sorting import FlowRunSort

    return await client.read_flow_runs(
        flow_run_filter=filters.FlowRunFilter(
            state=filters.FlowRunFilterState(type=filters.FlowRunFilterStateType(any_=states)),
            start_time=filters.FlowRunFilterStartTime(after_=since) if since else None,
        ),
        deployment_filter=filters.DeploymentFilter(tags=filters.DeploymentFilterTags(all_=["deal"])),
        sort=FlowRunSort.START_TIME_DESC, limit=limit,
    )


async def _newest(client: PrefectClient, states: list[StateType], since: datetime | None = None) -> list[RunStatus]:
    return [
        RunStatus(
            name=run.name, state=run.state_name or "unknown", run_id=str(run.id),
            since=run.start_time or run.expected_start_time or datetime.now(UTC),
            message=without_secrets((run.state and run.state.message) or ""),
        )
        for run in await read_runs(client, states, since, NEWEST)
    ]
