"""Commands that let a lineage's champion answer: a server on this machine, or a vLLM server."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import RenderableType
from rich.markup import escape
from typer import Option

from deal_core.errors import RegistryError
from deal_core.safe_text import printable_json
from flows.cli.session import CommandResult, Lineage, Session, command
from infra.store.keys import route_key

if TYPE_CHECKING:
    from tasks.vllm import ServingRoute

serve_app = typer.Typer()
vllm_app = typer.Typer(help="vLLM servers that serve a lineage's champion.", no_args_is_help=True)


@command(serve_app)
def serve(
    deal: Session,
    lineage: Lineage = "default",
    port: Annotated[int, Option("--port", min=0, max=65535, help="Port; 0 takes a free one.")] = 5001,
    host: Annotated[
        str, Option("--host", help="Address to listen on. DEAL_SERVE_API_KEY sets a token for clients.")
    ] = "127.0.0.1",
    trusted_host: Annotated[
        list[str] | None,
        Option(
            "--trusted-host",
            envvar="DEAL_TRUSTED_HOSTS",
            show_default=False,
            help="Host name that clients may use, in addition to localhost. Repeat it for several; * allows all.",
        ),
    ] = None,
) -> None:
    """Answer requests with the lineage's current champion. Ctrl-C ends the server."""
    import asyncio

    from infra.serving.champion import NoChampionError
    from infra.serving.run import serve as serve_champion
    from infra.tracking.registry import open_registry
    from tasks.adaptation.promote import settled_champion
    from tasks.context import current_store
    from tasks.lineage.history import unknown_lineage

    def tell(event: dict[str, Any], text: str) -> None:
        if deal.screen.as_json:  # one line for each event, because this command does not end
            sys.stdout.write(printable_json(json.dumps(event, ensure_ascii=False)) + "\n")
            sys.stdout.flush()
        else:
            deal.screen.out.print(text, soft_wrap=True)

    def say(text: str) -> None:
        tell({"event": text}, escape(text))

    def ready(url: str, version: str) -> None:
        told = {"url": url, "lineage": lineage, "version": version}
        tell(told, f"[bold green]{escape(lineage)}[/] answers at {url}/invocations. Ctrl-C ends it.")

    try:
        has_ended = asyncio.run(serve_champion(
            lineage, deal.home, host=host, port=port, trusted_hosts=trusted_host or (), say=say, ready=ready,
            settle=lambda: settled_champion(open_registry(), current_store(), lineage),
        ))  # fmt: skip
    except NoChampionError:
        raise RegistryError(unknown_lineage(lineage)) from None
    if not has_ended:  # at its exit Python would wait for the thread that asks MLflow
        sys.stdout.flush()
        os._exit(0)


@command(vllm_app, "starting")
def sync(
    deal: Session,
    lineage: Lineage = "default",
    url: Annotated[
        str | None, Option("--url", help="Address of the vLLM server.", show_default="DEAL_VLLM_URL")
    ] = None,
) -> CommandResult:
    """Load the lineage's champion into a vLLM server, once. Nothing changes if the server has it already."""
    from flows.serve_vllm import serve_vllm
    from tasks.spec import refuse_secrets

    if url:
        refuse_secrets(url)
    route = cast("ServingRoute", deal.run(lambda: serve_vllm(lineage, url)))  # one lineage, so one route
    return CommandResult(route, show_route(route))


def show_route(route: ServingRoute) -> Sequence[RenderableType]:
    """Which model name answers for a lineage."""
    return [
        f"[bold green]{escape(route.lineage)}[/] is answered by [bold]{escape(route.model or '–')}[/] "
        f"(version {escape(route.version or '–')}) at {escape(route.url)}",
        f"  requests name it as their model; the name stands in STORE/{escape(route_key(route.lineage))}",
    ]
