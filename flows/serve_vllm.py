"""Bring a vLLM server in step with one lineage's champion, or all; from a schedule, after a promotion, or by hand.

Example:
    >>> asyncio.run(serve_vllm("default", url="http://127.0.0.1:8000")).model  # doctest: +SKIP
    'default-v3'
"""

from __future__ import annotations

from prefect import flow, runtime

from deal_core.errors import DealError
from infra.settings import VllmSettings
from infra.tracking.registry import open_registry
from tasks.lineage.settings import for_each
from tasks.progress import Stages
from tasks.vllm import ServingRoute, sync_vllm


def _run_name() -> str:
    return f"serve-vllm-{runtime.flow_run.parameters.get('lineage') or 'all'}"


@flow(name="serve-vllm", flow_run_name=_run_name)
async def serve_vllm(lineage: str | None = None, url: str | None = None) -> ServingRoute | list[ServingRoute]:
    """Load the champion, see that it answers, move the route, unload what served before.

    Args:
        lineage: whose champion; None: that of every lineage that has one, as a schedule of Prefect's command gives no
            parameters. The routes come as a list then.
        url: address of the server; None: DEAL_VLLM_URL.

    Raises:
        ConfigError: the server would not take the adapter; nothing was changed.
        VllmError: the server refuses, or is away.
        DealError: of some of all lineages the server is not in step; of all the others it is.
    """
    settings = VllmSettings()
    if url is not None:
        settings = settings.model_copy(update={"url": url})
    return await (_sync_all(settings) if lineage is None else _sync(lineage, settings))


async def _sync(lineage: str, settings: VllmSettings) -> ServingRoute:
    stages = Stages()
    route = await stages.run("vllm", sync_vllm, lineage, settings)
    stages.done("vllm", f"{route.model} answers for {lineage}")
    return route


async def _sync_all(settings: VllmSettings) -> list[ServingRoute]:
    lineages = open_registry().lineages_with("champion")
    failure = "The server is not in step with lineage %s"
    routes, failed = await for_each(lineages, lambda lineage: _sync(lineage, settings), failure)
    if failed:
        raise DealError(
            f"With {len(failed)} of {len(lineages)} lineages the server is not in step. {' '.join(failed)}"
        )
    return routes
