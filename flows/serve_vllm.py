"""Serve with vLLM: load the champions of lineages into a vLLM server.

Example:
    >>> asyncio.run(serve_vllm("default", url="http://127.0.0.1:8000")).model  # doctest: +SKIP
    'default-v3'
"""

from __future__ import annotations

from prefect import flow, runtime

from infra.settings import VllmSettings
from infra.tracking.registry import open_registry
from tasks.lineage.settings import for_each
from tasks.progress import Stages
from tasks.serving.vllm import ServingRoute, sync_vllm


def _run_name() -> str:
    return f"serve-vllm-{runtime.flow_run.parameters.get('lineage') or 'all'}"


@flow(name="serve-vllm", flow_run_name=_run_name)
async def serve_vllm(lineage: str | None = None, url: str | None = None) -> ServingRoute | list[ServingRoute]:
    """Load the champion into a vLLM server, test an answer, move the route, and unload the earlier adapter.

    Args:
        lineage: The lineage; None: all lineages with a champion. The result is then a list. A schedule made with
            Prefect's command cannot give parameters.
        url: Address of the server; None: DEAL_VLLM_URL.

    Raises:
        ConfigError: The server cannot load such an adapter; nothing was changed.
        VllmError: The server refuses or does not answer.
        DealError: For some of all lineages, the server does not serve the champion. For all others it does.
    """
    settings = VllmSettings()
    if url is not None:
        settings = settings.model_copy(update={"url": url})

    async def sync(name: str) -> ServingRoute:
        stages = Stages()
        route = await stages.run("vllm", sync_vllm, name, settings)
        stages.done("vllm", f"{route.model} answers for {name}")
        return route

    if lineage is not None:
        return await sync(lineage)
    names = open_registry().lineages_with("champion")
    return await for_each(names, sync, "could not be brought in step with the server")
