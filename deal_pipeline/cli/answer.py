"""Commands that let a version answer: predict, and a server on this machine."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from typer import Argument, Option

from deal_core.errors import ConfigError, RegistryError
from deal_pipeline.cli.session import Column, CommandResult, Events, LineageOption, Session, command, main_app

if TYPE_CHECKING:
    from tasks.predict import Answer, FileAnswers

Version = Annotated[str | None, Option("--version", "-v", help="Number of the version.", show_default="the champion")]


@command(main_app, None, 'deal predict "My card is gone"', "deal predict --data mails.csv --task bank")
def predict(
    deal: Session,
    text: Annotated[str | None, Argument(help="Text to answer; - reads standard input.", show_default=False)] = None,
    data: Annotated[
        Path | None, Option("--data", "-d", help="File whose rows are answered: CSV, JSON lines or Parquet.")
    ] = None,
    task: Annotated[str | None, Option("--task", "-t", help="Task to ask.", show_default="the newest one")] = None,
    lineage: LineageOption = "",
    version: Version = None,
    out: Annotated[
        Path | None, Option("--out", "-o", help="With --data: .jsonl or .parquet.", show_default="next to the file")
    ] = None,
    column: Column = None,
) -> CommandResult[Answer | Annotated[FileAnswers, "with --data"]]:
    """Answer a text, or every row of a file."""
    if data is not None and text is not None:
        raise ConfigError("Give either a text or --data FILE, not both.")
    if data is None and (text is None or out is not None or column is not None):
        raise ConfigError("Give a text to answer, or a file with --data; --out and --column go with a file.")
    if text == "-":
        text = typer.get_text_stream("stdin").read().strip()
    with deal.screen.working("reading" if text is None else "predicting"):
        versions = deal.lineage(lineage)
        if text is not None:
            answer = versions.answer(text, task=task, version=version)
            if answer.problem:
                deal.screen.said(answer.problem)
            return CommandResult(answer, [escape(answer.answer)])
        assert data is not None
        answers = versions.predict_file(
            data,
            task=task,
            version=version,
            out=out,
            column=column,
            on_progress=lambda done, total: deal.screen.advanced("answering", done, total),
        )
    return CommandResult(answers, [*map(escape, _about_file(answers))])


def _about_file(result: FileAnswers) -> list[str]:
    shown = [
        f"{result.out}: {result.num_rows} rows answered by version {result.version} of {result.lineage} "
        f"as {result.task}, {result.seconds:.1f} s"
    ]
    if result.num_bad:
        shown.append(f"{result.num_bad} rows have no answer; the column {result.columns['problem']} says why.")
    if result.num_no_label:
        shown.append(f"{result.num_no_label} answers are no label of {result.task}, as that column says.")
    renamed = [name for name, column in result.columns.items() if name != column]
    if renamed:
        shown.append(f"The file has columns of these names already, so ours are called deal_…: {', '.join(renamed)}")
    return shown


@dataclass(frozen=True, kw_only=True)
class Serving:
    """A server that answers."""

    url: str
    """Its address."""
    lineage: str
    version: str
    """The version that answers first."""


@dataclass(frozen=True)
class ServingMessage:
    """What has happened to a server."""

    event: str
    """One sentence, such as that another version answers now."""


@command(
    main_app,
    None,
    "deal serve",
    "deal serve --engine http://127.0.0.1:8000",
    "deal serve --port 8000 --trusted-host models.example.org",
)
def serve(
    deal: Session,
    lineage: LineageOption = "",
    engine: Annotated[
        list[str] | None,
        Option(
            envvar="DEAL_ENGINE_URL",
            show_default=False,
            help="Address of a vLLM server that computes the answers, instead of this process. Repeat it for several.",
        ),
    ] = None,
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
) -> Events[Annotated[Serving, "once, when the server answers"] | ServingMessage]:
    """Answer requests over HTTP with the champion.

    A new champion is taken without a pause. Ctrl-C ends the server.
    """
    from infra.serving.champion import NoChampionError
    from infra.serving.run import serve as serve_champion
    from tasks.lineage.history import unknown_lineage
    from tasks.spec import refuse_secrets

    for url in engine or ():
        refuse_secrets(url)
    events: Events[Serving | ServingMessage] = Events(deal.screen)

    def say(text: str) -> None:
        events.tell(ServingMessage(text), escape(text))

    def ready(url: str, version: str) -> None:
        serving = Serving(url=url, lineage=lineage, version=version)
        events.tell(serving, f"[bold green]{escape(lineage)}[/] answers at {url}/invocations. Ctrl-C ends it.")

    store = deal.store
    try:
        has_ended = serve_champion(
            store,
            lineage,
            deal.home,
            host=host,
            port=port,
            trusted_hosts=trusted_host or (),
            engines=engine or (),
            say=say,
            ready=ready,
        )
    except NoChampionError:
        raise RegistryError(unknown_lineage(store, lineage)) from None
    if not has_ended:  # at its exit Python would wait for the thread that asks the store
        sys.stdout.flush()
        os._exit(0)
    return events
