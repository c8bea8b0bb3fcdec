"""Commands for base models: `deal model`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from typer import Argument

from deal_pipeline.cli.session import CommandResult, Session, command

if TYPE_CHECKING:
    from deal_pipeline.results import FetchedBase

model_app = typer.Typer(help="Fetch a base model.", no_args_is_help=True)


@model_app.callback()
def _model() -> None:
    """Keep `fetch` a subcommand: with one command, typer would make it the group itself."""


@command(model_app, "fetch", "deal model fetch", "deal model fetch HuggingFaceTB/SmolLM2-360M-Instruct")
def fetch(
    deal: Session,
    source: Annotated[str, Argument(help="Built-in name, Hub id, local folder or GGUF file.")] = (
        "smollm2-135m-instruct"
    ),
) -> CommandResult[FetchedBase]:
    """Fetch, check and convert a base model, so that runs need no network."""
    fetched = deal.service.fetch(source)
    return CommandResult(fetched, [escape(f"{source} is in {fetched.folder}")])
