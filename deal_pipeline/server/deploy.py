"""Create or update the pools, automations and deployments of this project on a Prefect server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import prefect
import yaml
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName, DeploymentFilterTags
from prefect.exceptions import ObjectNotFound
from prefect.settings import get_current_settings
from prefect.utilities.schema_tools.validation import validate
from prefect.utilities.templating import apply_values
from prefect.variables import Variable

from deal_core.errors import ConfigError, DealError
from deal_core.limits import require
from deal_core.safe_text import without_secrets
from deal_pipeline.server.automations import NEVER_BEGAN, PROCESS_NEVER_BEGAN, apply_automations, apply_notifications
from infra.store.opening import open_store

PoolType = Literal["process", "docker", "kubernetes"]
ManifestKind = Literal["train-job", "ray-cluster"]
GPU_POOL, CPU_POOL = "deal-gpu", "deal-cpu"
STORE_VARIABLE = "deal_store"
"""The variable on the server with the address of the store that the deployments work with."""
INFRA = Path(__file__).parents[2] / "infra"
POOL_CHANGES = INFRA / "work_pools.yaml"
CLUSTER_JOBS = INFRA / "cluster_jobs.yaml"
PREFECTS_POOLS = "server/api/collections_data/views/aggregate-worker-metadata.json"
"""Prefect's file of the templates of all types of pools. It is in Prefect's own package."""


class DeployError(DealError):
    """The server refuses the deployments."""

    code = "deploy"


async def deploy_all(
    home: Path,
    gpu_pool_type: PoolType = "process",
    num_trainings: int | None = None,
    *,
    values: Mapping[str, Any] | None = None,
    replace: bool = False,
) -> None:
    """Create or update everything on the server.

    Args:
        home: Working directory of the runs; its logs/ gets the log of the deployment.
        gpu_pool_type: How a worker of the training pool starts a run. Runs of the other pool are processes.
        num_trainings: Limit of runs in the training pool at the same time, for all workers together; None: unchanged.
        values: The training pool's variables that get a new default, such as an image and the number of GPUs.
        replace: Overwrite deployments of another home or store.

    Raises:
        ConfigError: No server is named, the server has the deployments of another home or store, the pool exists with
            another type, a value does not fit, or there is no prefect.yaml.
        DeployError: Prefect refuses the deployments.
        StoreError: The store does not answer, or lets two writers overwrite each other.
    """
    if not get_current_settings().api.url:
        raise ConfigError("No Prefect server is named; set PREFECT_API_URL, or start one here with: deal server up")
    store = open_store()
    store.check()
    ours = {"home": str(home), "store": without_secrets(store.uri)}
    async with get_client() as client:
        if not replace:
            await _require_own(client, ours)
        await _apply_pool(client, GPU_POOL, gpu_pool_type, values or {})
        await _apply_pool(client, CPU_POOL, "process")
        if num_trainings is not None:
            await client.update_work_pool(GPU_POOL, WorkPoolUpdate(concurrency_limit=num_trainings))
        await apply_automations(client, PROCESS_NEVER_BEGAN if gpu_pool_type == "process" else NEVER_BEGAN)
        await apply_notifications(client)
        ours_alone = DeploymentFilter(tags=DeploymentFilterTags(all_=["deal"]))
        deployments = await client.read_deployments(deployment_filter=ours_alone)
    paused = {deployment.name for deployment in deployments if deployment.paused}
    _deploy_file(home, paused)
    await Variable.aset(STORE_VARIABLE, ours["store"], overwrite=True)


async def _require_own(client: PrefectClient, ours: dict[str, str]) -> None:
    """Refuse to overwrite deployments that work in another home or store.

    Prefect keeps the home as the working directory of each run.
    """
    ours_alone = DeploymentFilter(name=DeploymentFilterName(any_=["adapt"]), tags=DeploymentFilterTags(all_=["deal"]))
    deployments = await client.read_deployments(deployment_filter=ours_alone)
    steps = [step for deployment in deployments for step in deployment.pull_steps or ()]
    homes = [str(settings["directory"]) for step in steps for settings in step.values() if "directory" in settings]
    if not homes:
        return
    theirs = {"home": homes[0], "store": str(await Variable.aget(STORE_VARIABLE, default=""))}
    differing = [
        f"the {name} is {theirs[name]}, here it is {here}"
        for name, here in ours.items()
        if theirs[name] not in ("", here)
    ]
    if differing:
        raise ConfigError(
            f"The Prefect server has deployments of another installation: {'; '.join(differing)}. Deploying here would "
            "break its runs. Deploy where its workers are, take a Prefect server of your own, or overwrite its "
            "deployments with: deal server register --replace"
        )


def _deploy_file(home: Path, paused: Collection[str]) -> None:
    """Deploy prefect.yaml. Deployments that a person has paused stay paused; Prefect would enable them."""
    content = yaml.safe_load(prefect_file().read_text(encoding="utf-8"))
    for deployment in content["deployments"]:
        if deployment["name"] in paused:
            deployment["paused"] = True
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prefect.yaml"
        file.write_text(yaml.safe_dump(content), encoding="utf-8")
        command = ("prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(file))
        done = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=home,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "DEAL_HOME": str(home), "PREFECT_API_URL": str(get_current_settings().api.url)},
        )
    log = home / "logs" / "deploy.log"
    log.write_text(done.stdout + done.stderr, encoding="utf-8")
    if done.returncode:
        raise DeployError(f"The deployments could not be made; {log} says why.")


def prefect_file() -> Path:
    """Return the path of prefect.yaml, in the checkout or in the installed package.

    Raises:
        ConfigError: The file is in neither place.
    """
    places = [Path(__file__).parents[2], Path(sysconfig.get_path("data")) / "share" / "deal-pipeline"]
    for place in places:
        if (place / "prefect.yaml").is_file():
            return place / "prefect.yaml"
    raise ConfigError(f"There is no prefect.yaml in {' or '.join(map(str, places))}; install the project again.")


async def _apply_pool(
    client: PrefectClient, name: str, pool_type: PoolType, values: Mapping[str, Any] | None = None
) -> None:
    template = pool_template(pool_type)
    require_values(values or {}, variables_of(pool_type))
    try:
        known = await client.read_work_pool(name)
    except ObjectNotFound:
        template = with_defaults(template, values or {})
        await client.create_work_pool(WorkPoolCreate(name=name, type=pool_type, base_job_template=template))
        return
    if known.type != pool_type:
        problem = f"The work pool {name} has type {known.type}, not {pool_type}"
        raise ConfigError(f"{problem}; delete the pool, or give --type {known.type}.")
    template = with_defaults(with_defaults_of(known.base_job_template, template), values or {})
    await client.update_work_pool(name, WorkPoolUpdate(base_job_template=template))


def pool_template(pool_type: PoolType) -> dict[str, Any]:
    """Return Prefect's template of a pool, with this project's changes."""
    packages = json.loads((Path(prefect.__file__).parent / PREFECTS_POOLS).read_text(encoding="utf-8"))
    templates = {
        worker["type"]: worker["default_base_job_configuration"]
        for workers in packages.values()
        for worker in workers.values()
    }
    changes = yaml.safe_load(POOL_CHANGES.read_text(encoding="utf-8"))
    return _changed(templates[pool_type], changes.get(pool_type, {}))


def _changed(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `values` with a JSON merge patch (RFC 7396): None removes a key, and only objects are merged."""
    changed = dict(values)
    for key, change in changes.items():
        if change is None:
            changed.pop(key, None)
        elif isinstance(change, Mapping):
            changed[key] = _changed(values.get(key, {}), change)
        else:
            changed[key] = change
    return changed


def with_defaults_of(known: Mapping[str, Any], template: Mapping[str, Any]) -> dict[str, Any]:
    """Return the template with the pool's own defaults, so that an image, GPUs or nodes set by a person stay."""
    before = known.get("variables", {}).get("properties", {})
    return with_defaults(
        template, {name: variable["default"] for name, variable in before.items() if "default" in variable}
    )


def with_defaults(template: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the template with these values as its variables' defaults; values of no variable are left out."""
    properties = {
        name: {**variable, "default": values[name]} if name in values else variable
        for name, variable in template["variables"]["properties"].items()
    }
    return {**template, "variables": {**template["variables"], "properties": properties}}


def variables_of(pool_type: PoolType) -> dict[str, Any]:
    """Return the variables of a pool, by name; on Kubernetes also those of trainings over several machines."""
    own = yaml.safe_load(CLUSTER_JOBS.read_text(encoding="utf-8"))["variables"] if pool_type == "kubernetes" else {}
    return {**pool_template(pool_type)["variables"]["properties"], **own}


def require_values(values: Mapping[str, Any], variables: Mapping[str, Any]) -> None:
    """Refuse values of no variable, and values that do not fit theirs.

    Raises:
        ConfigError: The message names the variable.
    """
    unknown = sorted(values.keys() - variables.keys())
    if unknown:
        raise ConfigError(f"There is no value {unknown[0]!r}; give some of: {', '.join(sorted(variables))}.")
    for error in validate(dict(values), {"type": "object", "properties": dict(variables)}):
        raise ConfigError(f"The value {'.'.join(map(str, error.path))} does not fit: {error.message}.")


def make_manifests(kind: ManifestKind, values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the Kubernetes objects of a training over several machines, with these values in place of the defaults.

    Raises:
        ConfigError: A value does not fit, or one without a default is missing.
    """
    variables, jobs = variables_of("kubernetes"), yaml.safe_load(CLUSTER_JOBS.read_text(encoding="utf-8"))
    require_values(values, variables)
    for name in jobs["required"][kind]:
        require(name in values, f"The value {name!r} is missing: {variables[name]['description']}")
    defaults = {name: each["default"] for name, each in variables.items() if each.get("default") is not None}
    made: list[dict[str, Any]] = apply_values(jobs[kind], {**defaults, **values})
    return made
