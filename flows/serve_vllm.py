"""Bring a vLLM server in step with a lineage's champion; from a schedule, after a promotion, or by hand.

Example:
    >>> asyncio.run(serve_vllm("default", url="http://127.0.0.1:8000")).model  # doctest: +SKIP
    'default-v3'
"""

from __future__ import annotations

from prefect import flow

from flows.stages import Stages
from infra.settings import VllmSettings
from tasks.serving import ServingRoute, sync_vllm


@flow(name="serve-vllm", flow_run_name="serve-vllm-{lineage}")
async def serve_vllm(lineage: str, url: str | None = None) -> ServingRoute:
    """Load the champion, see that it answers, move the route, unload what served before.

    Args:
        lineage: whose champion.
        url: address of the server; None: DEAL_VLLM_URL.

    Raises:
        ConfigError: the server would not take the adapter; nothing was changed.
        VllmError: the server refuses, or is away.
    """
    settings = VllmSettings()
    if url is not None:
        settings = settings.model_copy(update={"url": url})
    stages = Stages()
    route = await stages.run("vllm", sync_vllm, lineage, settings)
    stages.done("vllm", f"{route.model} answers for {lineage}")
    return route
