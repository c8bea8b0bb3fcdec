"""Commands that let a lineage's champion answer: a server on this machine, and vLLM servers kept in step."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType
from rich.markup import escape

from deal_core.printable import printable_json
from flows.cli.session import Debug, Home, Json, Lineage, session
from infra.store.keys import route_key

if TYPE_CHECKING:
    from tasks.serving.registered import ServingRoute

serve_app = typer.Typer()
vllm_app = typer.Typer(help="vLLM servers that serve a lineage's champion.", no_args_is_help=True)



@serve_app.command()
def serve(
    lineage: Lineage = "default",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes a free one.")] = 5001,
    host: Annotated[str, typer.Option("--host", help="Address to listen on; there is no password.")] = "127.0.0.1",
    trusted_host: Annotated[
        list[str] | None,
        typer.Option("--trusted-host", envvar="DEAL_TRUSTED_HOSTS", show_default=False,
                     help="Name under which clients ask for it, besides localhost; repeat it for several, * for all."),
    ] = None,
    home: Home = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Answer requests with the lineage's champion, always the version that has the alias now; Ctrl-C ends it."""
    with session(home, as_json, debug) as deal:
        import asyncio

        from infra.serving.run import serve as serve_champion

        def tell(event: dict[str, Any], text: str) -> None:
            if as_json:  # one line for each event, as this command goes on
                sys.stdout.write(printable_json(json.dumps(event, ensure_ascii=False)) + "\n")
                sys.stdout.flush()
            else:
                deal.screen.out.print(text, soft_wrap=True)

        def say(text: str) -> None:
            tell({"event": text}, escape(text))

        def ready(url: str, version: str) -> None:
            told = {"url": url, "lineage": lineage, "version": version}
            tell(told, f"[bold green]{escape(lineage)}[/] answers at {url}/invocations. Ctrl-C ends it.")

        has_ended = asyncio.run(serve_champion(
            lineage, deal.home, host=host, port=port, trusted_hosts=trusted_host or (), say=say, ready=ready
        ))  # fmt: skip
        if not has_ended:  # Python would wait at its exit for the thread that asks MLflow
            sys.stdout.flush()
            os._exit(0)


@vllm_app.command("sync")
def sync(
    lineage: Lineage = "default",
    url: Annotated[
        str | None, typer.Option("--url", help="Address of the vLLM server.", show_default="DEAL_VLLM_URL")
    ] = None,
    home: Home = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Bring a vLLM server in step with the lineage's champion, once; what is in step already stays."""
    with session(home, as_json, debug) as deal:
        from tasks.spec import refuse_secrets

        if url:
            refuse_secrets(url)

        def start() -> Any:
            from flows.serve_vllm import serve_vllm

            return serve_vllm(lineage, url)

        route = deal.run(start)

        deal.screen.result(route.model_dump(mode="json"), *show_route(route))


def show_route(route: ServingRoute) -> Sequence[RenderableType]:
    """Which model name answers for a lineage."""
    return [
        f"[bold green]{escape(route.lineage)}[/] is answered by [bold]{escape(route.model or '–')}[/] "
        f"(version {escape(route.version or '–')}) at {escape(route.url)}",
        f"  requests name it as their model; the name stands in STORE/{escape(route_key(route.lineage))}",
    ]
