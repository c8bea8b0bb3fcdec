"""Commands that let versions answer: a server on this machine, vLLM servers, and exports for other programs."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer
from rich.markup import escape
from typer import Argument, Option

from deal_core.errors import ConfigError, RegistryError
from deal_core.safe_text import printable_json
from flows.cli.session import CommandResult, Lineage, Session, command, main_app
from infra.store.keys import route_key

if TYPE_CHECKING:
    from tasks.serving.vllm import ServingRoute

vllm_app = typer.Typer(help="vLLM servers that serve a lineage's champion.", no_args_is_help=True)


@command(main_app)
def serve(
    deal: Session,
    lineage: Lineage = "default",
    port: Annotated[int, Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 5001,
    host: Annotated[
        str, Option(help="Address to listen on. DEAL_SERVE_API_KEY sets a token for clients.")
    ] = "127.0.0.1",
    trusted_host: Annotated[
        list[str] | None,
        Option(
            envvar="DEAL_TRUSTED_HOSTS",
            show_default=False,
            help="Host name that clients may use, in addition to localhost. Repeat it for several; * allows all.",
        ),
    ] = None,
) -> None:
    """Answer requests with the lineage's current champion. Ctrl-C ends the server."""
    from infra.serving.champion import NoChampionError
    from infra.serving.run import serve as serve_champion
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
        has_ended = serve_champion(
            deal.store,
            lineage,
            deal.home,
            host=host,
            port=port,
            trusted_hosts=trusted_host or (),
            say=say,
            ready=ready,
        )
    except NoChampionError:
        raise RegistryError(unknown_lineage(lineage)) from None
    if not has_ended:  # at its exit Python would wait for the thread that asks the store
        sys.stdout.flush()
        os._exit(0)


@command(vllm_app, "starting")
def sync(
    deal: Session,
    lineage: Lineage = "default",
    url: Annotated[str | None, Option(help="Address of the vLLM server.", show_default="DEAL_VLLM_URL")] = None,
) -> CommandResult:
    """Load the lineage's champion into a vLLM server, once. Nothing changes if the server has it already."""
    from flows.champions import serve_vllm
    from tasks.spec import refuse_secrets

    if url:
        refuse_secrets(url)
    route = cast("ServingRoute", deal.run(lambda: serve_vllm(lineage, url)))  # one lineage, so one route
    shown = [
        f"[bold green]{escape(route.lineage)}[/] is answered by [bold]{escape(route.model or '–')}[/] "
        f"(version {escape(route.version or '–')}) at {escape(route.url)}",
        f"  requests name it as their model; the name stands in STORE/{escape(route_key(route.lineage))}",
    ]
    return CommandResult(route, shown)


@command(vllm_app, "publishing")
def publish(
    deal: Session,
    folder: Annotated[
        Path,
        Argument(
            envvar="VLLM_LORA_RESOLVER_CACHE_DIR", help="The servers' folder of adapters, as this machine sees it."
        ),
    ],
    lineage: Lineage = "default",
    version: Annotated[str | None, Option("--version", "-v", help="Its number.", show_default="the champion")] = None,
    model: Annotated[
        str | None,
        Option(
            help="The model that `vllm serve` was started with, word for word.",
            show_default="the base model's Hub id or folder",
        ),
    ] = None,
) -> CommandResult:
    """Write a version's folder for vLLM's filesystem resolver. Every replica finds it by its name."""
    from infra.settings import VllmSettings
    from tasks.serving.vllm import publish as publish_version

    found = publish_version(lineage, folder, VllmSettings(), version=version, model=model)
    state = "is in" if found.is_new else "was already in"
    shown = [
        f"[bold green]{escape(found.model)}[/] {state} {escape(found.folder)}: version {escape(found.version)} of "
        f"{escape(found.lineage)}",
        f"  requests name it as their model; the servers run: vllm serve {escape(found.base_model)}",
    ]
    return CommandResult(found, shown)


@command(main_app, "exporting")
def export(
    deal: Session,
    version: Annotated[str, Argument(help="Number of the version.")],
    target: Annotated[str, Argument(help="New folder; with --to hub: OWNER/NAME of the repository.")],
    to: Annotated[str, Option(help="merged: a transformers folder. hub: the PEFT folder, on the Hub.")],
    lineage: Lineage = "default",
) -> CommandResult:
    """Export a version for other programs, and compare its logits with the served version."""
    from tasks.serving.export import Target, export_version

    if to not in get_args(Target):
        raise ConfigError(f"--to is {to!r}; give one of {', '.join(get_args(Target))}.")
    found = export_version(lineage, version, cast("Target", to), target)
    shown = [
        f"[bold green]Version {escape(found.version)} of {escape(found.lineage)}[/] is in {escape(found.address)}",
        f"  logits differ from the served version by {found.max_difference:.2g} at most, on {found.num_prompts} "
        f"prompts of its tasks, in {found.precision} ({found.tolerance:g} is allowed)",
    ]
    return CommandResult(found, shown)
