"""Bring the local whole up: servers, pools, deployments, automations, workers, in this order, each awaited."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterName,
    DeploymentFilterTags,
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import State, StateType, WorkerStatus
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import AwaitingRetry, Crashed

from flows.server.automations import RETURNING
from flows.server.deploy import deploy_all
from flows.server.stack import (
    CPU_POOL,
    GPU_POOL,
    START_SECONDS,
    Say,
    Stack,
    StartError,
    heal,
    hold_stack,
    read_stack,
    start_servers,
    start_workers,
    stop,
)


async def bring_up(home: Path, *, prefect_port: int, mlflow_port: int, num_trainings: int, say: Say) -> Stack:
    """Start everything, or what has died of it, and return once it works.

    Args:
        home: the folder that holds everything.
        prefect_port: port of the Prefect server on the loopback address.
        mlflow_port: port of the MLflow server.
        num_trainings: lineages that may learn at once.
        say: told what happens.

    Raises:
        ConfigError: all of it is up already.
        StartError: a part did not come up; what was started is ended again.
    """
    with hold_stack(home):
        return await _bring_up(home, prefect_port, mlflow_port, num_trainings, say)


async def _bring_up(home: Path, prefect_port: int, mlflow_port: int, num_trainings: int, say: Say) -> Stack:
    running = read_stack(home)
    if running and running.is_alive() and running.is_complete():
        heal(home, running, say)
        return running
    if stop(home):
        say("what an earlier start left was ended")
    stack = start_servers(home, prefect_port, mlflow_port, say)
    try:
        with temporary_settings({PREFECT_API_URL: stack.environment()["PREFECT_API_URL"]}):
            say("deployments are made")
            await deploy_all(home, num_trainings=num_trainings)
            async with get_client() as client:
                await _restart_what_was_left(client)
                start_workers(home, stack, num_trainings, say)
                await _wait_for_workers(client, stack)
                watching = await client.read_deployment_by_name("watch-inbox/watch-inbox")
                await client.create_flow_run_from_deployment(watching.id)  # the schedule's first may be minutes away
    except BaseException:
        stop(home)
        raise
    return stack


async def _restart_what_was_left(client: PrefectClient) -> None:
    """What the server takes to be running, before any worker is, died with the last ones: it starts again if it may."""
    left = [StateType.RUNNING, StateType.PENDING]
    runs = await client.read_flow_runs(
        flow_run_filter=FlowRunFilter(
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=left)),
            deployment_id=FlowRunFilterDeploymentId(is_null_=False),
        ),
        deployment_filter=DeploymentFilter(tags=DeploymentFilterTags(all_=["deal"])),
    )
    names = DeploymentFilterName(any_=RETURNING)
    returning = {each.id for each in await client.read_deployments(deployment_filter=DeploymentFilter(name=names))}
    for run in runs:
        again: State[Any] = AwaitingRetry(message="Its worker was ended.")
        crashed: State[Any] = Crashed(message="Its worker was ended; look what it did, and start it again if need be.")
        await client.set_flow_run_state(run.id, again if run.deployment_id in returning else crashed, force=True)


async def _wait_for_workers(client: PrefectClient, stack: Stack) -> None:
    deadline = time.monotonic() + START_SECONDS
    for pool in (GPU_POOL, CPU_POOL):
        part = next(part for part in stack.parts if part.name == f"worker-{pool}")
        while True:
            workers = await client.read_workers_for_work_pool(pool)
            if any(worker.name == part.name and worker.status == WorkerStatus.ONLINE for worker in workers):
                break
            if not part.is_alive() or time.monotonic() > deadline:
                raise StartError(f"{part.name} did not come up; the end of {part.log} says why.")
            await asyncio.sleep(0.5)
