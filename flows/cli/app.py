"""The `deal` command. Heavy imports happen inside commands, so that `deal --help` answers at once."""

from __future__ import annotations

from importlib import metadata
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import flows.cli.housekeeping  # adds its commands to main_app
import flows.cli.learn  # noqa: F401
from flows.cli.live import rollout_app
from flows.cli.plan import model_app
from flows.cli.serve import vllm_app
from flows.cli.server import lineage_app, server_app
from flows.cli.session import main_app
from flows.cli.versions import tests_app

TOPICS = {
    "Learn": ("demo", "plan", "validate", "adapt", "watch", "predict"),
    "Look": ("status", "history", "report", "ui", "evaluate", "benchmark"),
    "Decide which version serves": ("promote", "rollback", "reject", "requeue", "rollout"),
    "Serve, and learn from what is served": ("serve", "vllm", "export", "monitor", "select", "feedback", "harvest"),
    "Lineages, tasks and data": ("lineage", "labels", "tests", "model", "forget", "gc"),
    "Servers": ("up", "down", "deploy", "server"),
}
"""The commands in the order of the help, by topic."""


class _ByTopic(TyperGroup):
    """Shows the commands under their topics."""

    def list_commands(self, ctx: Any) -> list[str]:
        for topic, names in TOPICS.items():
            for name in names:
                self.commands[name].rich_help_panel = topic  # type: ignore[attr-defined]
        return [name for names in TOPICS.values() for name in names]


app = typer.Typer(
    name="deal",
    cls=_ByTopic,
    help="Continual LoRA adaptation: one adapter learns domain after domain and keeps what it learned before.",
    epilog="Exit codes: 0 done, 1 failed, 2 wrong use, 3 rejected by the gate, 130 stopped by Ctrl-C.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(main_app)
app.add_typer(model_app, name="model")
app.add_typer(lineage_app, name="lineage")
app.add_typer(tests_app, name="tests")
app.add_typer(vllm_app, name="vllm")
app.add_typer(rollout_app, name="rollout")
app.add_typer(server_app, name="server")


def _say_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"deal-pipeline {metadata.version('deal-pipeline')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Show the program's version.")
    ] = False,
) -> None:
    del version


def main() -> None:
    """Run the command; the entry point of the installed `deal`."""
    app()
