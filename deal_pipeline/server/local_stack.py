"""`deal server up`: start a Prefect server, an MLflow server, deployments and workers on this machine.

All servers listen on the loopback address only.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName
from prefect.client.schemas.objects import State, StateType, WorkerStatus
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import AwaitingRetry, Crashed

from deal_core.errors import ConfigError, DealError
from deal_pipeline.server.automations import RETURNING
from deal_pipeline.server.deploy import CPU_POOL, GPU_POOL, deploy_all
from deal_pipeline.server.embedded import require_database
from deal_pipeline.server.local_processes import SUPERVISOR, LocalStack, hold_stack, read_stack, start_part, stop
from deal_pipeline.server.status import read_runs
from infra.settings import TrackingSettings

START_SECONDS = 180.0
LOOK_SECONDS = 0.3
Say = Callable[[str], None]


class StartError(DealError):
    """A server or worker did not start."""

    code = "server-start"


async def bring_up(home: Path, *, prefect_port: int, mlflow_port: int, num_trainings: int, say: Say) -> LocalStack:
    """Start everything; return when everything works. What is left of an earlier start is ended first.

    At most `num_trainings` lineages train at the same time. `say` gets messages for the user.

    Raises:
        ConfigError: Everything runs already.
        StartError: A process did not start. All processes are ended again.
    """
    with hold_stack(home):
        running = read_stack(home)
        if running and running.is_complete():
            raise ConfigError(
                f"It is up already: Prefect at {running.prefect_url}, MLflow at {running.mlflow_url}. End it with: "
                "deal server down"
            )
        if stop(home):
            say("processes of an earlier start were ended")
        if running and os.environ.get("MLFLOW_TRACKING_URI") == running.mlflow_url:  # this command was to ask it
            os.environ["MLFLOW_TRACKING_URI"] = running.backend_uri
        try:
            stack = start_servers(home, prefect_port, mlflow_port, say)
            with temporary_settings({PREFECT_API_URL: stack.environment()["PREFECT_API_URL"]}):
                say("deployments are made")
                await deploy_all(home, num_trainings=num_trainings, replace=True)  # its own server
                async with get_client() as client:
                    await _restart_left_runs(client)
                    start_workers(home, stack, num_trainings, say)
                    await _wait_for_workers(client, stack)
                    watching = await client.read_deployment_by_name("watch-inbox/watch-inbox")
                    await client.create_flow_run_from_deployment(watching.id)  # the schedule starts it minutes later
        except BaseException:
            stop(home)
            raise
        return stack


def start_servers(home: Path, prefect_port: int, mlflow_port: int, say: Say) -> LocalStack:
    """Start both servers and wait until they answer.

    Raises:
        ConfigError: MLFLOW_TRACKING_URI names a server, a port is taken, or MLflow's server is not installed.
        DatabaseError: Prefect's database is damaged.
        StartError: A server ended, or does not answer in time. The caller must then call `stop`.
    """
    settings = TrackingSettings()
    if settings.tracking_uri.startswith(("http://", "https://")):
        raise ConfigError("MLFLOW_TRACKING_URI names a server; deal server up starts one of its own, so unset it.")
    if importlib.util.find_spec("flask") is None:
        raise ConfigError("MLflow's server is not installed here, only its client, as on a worker; pip install mlflow.")
    for name, port in (("prefect", prefect_port), ("mlflow", mlflow_port)):
        with socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                raise ConfigError(f"Something listens on port {port} already; give another with --{name}-port.")
    require_database()
    stack = LocalStack(
        prefect_url=f"http://127.0.0.1:{prefect_port}",
        mlflow_url=f"http://127.0.0.1:{mlflow_port}",
        backend_uri=settings.tracking_uri,
        artifact_uri=settings.artifact_uri,
    )
    for name, command in server_commands(prefect_port, mlflow_port).items():
        say(f"{name} starts")
        start_part(home, stack, name, command)
    _wait_for_servers(stack)
    return stack


def server_commands(prefect_port: int, mlflow_port: int) -> dict[str, tuple[str, ...]]:
    """Return the arguments of Python that start each server."""
    prefect = f"-m prefect server start --host 127.0.0.1 --port {prefect_port}"
    mlflow = f"-m mlflow server --host 127.0.0.1 --port {mlflow_port} --workers 1"
    # without a line for each request in the log: `deal serve` sends one every two seconds
    return {
        "prefect-server": tuple(prefect.split()),
        "mlflow-server": (*mlflow.split(), "--uvicorn-opts=--no-access-log"),
    }


def start_workers(home: Path, stack: LocalStack, num_trainings: int, say: Say) -> None:
    """Start the workers of both pools, and the supervisor. At most `num_trainings` lineages train at the same time."""
    gpus: list[str] = []
    if num_trainings > 1:
        from deal_core.base_model.device import visible_gpus  # imports torch

        gpus = visible_gpus()
    shares = share_gpus(gpus, num_trainings)
    workers = [(GPU_POOL, "" if len(shares) == 1 else f"-{number}", *share) for number, share in enumerate(shares, 1)]
    for pool, suffix, own, limit in [*workers, (CPU_POOL, "", "", 3)]:
        name = f"worker-{pool}{suffix}"
        say(f"{name} starts")
        command = f"-m prefect worker start --pool {pool} --name {name} --limit {limit} --no-create-pool-if-not-found"
        start_part(home, stack, name, tuple(command.split()), own)
    start_part(home, stack, SUPERVISOR, ("-m", "deal_pipeline.server.local_processes", str(home)))


def share_gpus(gpus: Sequence[str], num_trainings: int) -> list[tuple[str, int]]:
    """Return each worker's GPUs, as CUDA_VISIBLE_DEVICES names them, and how many trainings it runs at the same time.

    Trainings share a GPU only if there are more trainings than GPUs. A single training has all GPUs.
    """
    num_workers = max(1, min(len(gpus), num_trainings))
    return [
        (",".join(gpus[number::num_workers]), len(range(number, num_trainings, num_workers)))
        for number in range(num_workers)
    ]


def _wait_for_servers(stack: LocalStack) -> None:
    urls = {"prefect-server": f"{stack.prefect_url}/api/health", "mlflow-server": f"{stack.mlflow_url}/health"}
    for part in [part for part in stack.parts if part.is_server]:
        deadline = time.monotonic() + START_SECONDS
        while True:
            answers = False
            with suppress(httpx.HTTPError):
                answers = httpx.get(urls[part.name], timeout=5).is_success
            if not part.is_alive():  # another program may answer at its port
                raise StartError(f"{part.name} ended before it answered; the end of {part.log} says why.")
            if answers:
                break
            if time.monotonic() > deadline:
                raise StartError(f"{part.name} did not answer within {START_SECONDS:.0f} s; {part.log} may say why.")
            time.sleep(LOOK_SECONDS)


async def _restart_left_runs(client: PrefectClient) -> None:
    """Give runs of ended workers a new state: scheduled again if their deployment allows that, else crashed.

    No worker runs yet, so every run that the server lists as running or pending belonged to an ended worker.
    """
    named = DeploymentFilter(name=DeploymentFilterName(any_=RETURNING))
    returning = {deployment.id for deployment in await client.read_deployments(deployment_filter=named)}
    for run in await read_runs(client, [StateType.RUNNING, StateType.PENDING]):
        state: State[Any] = AwaitingRetry(message="Its worker was ended.")
        if run.deployment_id not in returning:
            state = Crashed(message="Its worker was ended. Check what the run did, and start it again if necessary.")
        await client.set_flow_run_state(run.id, state, force=True)


async def _wait_for_workers(client: PrefectClient, stack: LocalStack) -> None:
    deadline = time.monotonic() + START_SECONDS
    for pool in (GPU_POOL, CPU_POOL):
        waiting = {part.name: part for part in stack.parts if part.name.startswith(f"worker-{pool}")}
        while waiting:
            for worker in await client.read_workers_for_work_pool(pool):
                if worker.status == WorkerStatus.ONLINE:
                    waiting.pop(worker.name, None)
            for part in waiting.values():
                if not part.is_alive() or time.monotonic() > deadline:
                    raise StartError(f"{part.name} did not come up; the end of {part.log} says why.")
            await asyncio.sleep(0.5)
