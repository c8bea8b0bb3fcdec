"""Commands for base models: `deal model`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer
from rich.markup import escape
from typer import Argument

from deal_pipeline.cli.session import CommandResult, Session, command

model_app = typer.Typer(help="Fetch a base model.", no_args_is_help=True)


@model_app.callback()
def _model() -> None:
    """Keep `fetch` a subcommand: with one command, typer would make it the group itself."""


@dataclass(frozen=True, kw_only=True)
class FetchedBase:
    """A base model that runs can use without a network."""

    source: str
    """The name, Hub id, folder or file that was given."""
    folder: str
    """The folder that it is in."""


@command(model_app, "fetch", "deal model fetch", "deal model fetch HuggingFaceTB/SmolLM2-360M-Instruct")
def fetch(
    deal: Session,
    source: Annotated[str, Argument(help="Built-in name, Hub id, local folder or GGUF file.")] = (
        "smollm2-135m-instruct"
    ),
) -> CommandResult[FetchedBase]:
    """Fetch, check and convert a base model, so that runs need no network."""
    from deal_core.base_model.sources import resolve_base
    from infra.settings import HomeSettings

    folder = resolve_base(
        source, HomeSettings().cache_dir, lambda doing, done, total: deal.screen.advanced("fetch", done, total, doing)
    )
    return CommandResult(FetchedBase(source=source, folder=str(folder)), [escape(f"{source} is in {folder}")])
