"""The `deal` command. Heavy imports happen inside commands, so that `deal --help` answers at once."""

from __future__ import annotations

import atexit
import gc
from importlib import metadata
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import deal_pipeline.cli.answer
import deal_pipeline.cli.check
import deal_pipeline.cli.learn
import deal_pipeline.cli.live
import deal_pipeline.cli.server  # noqa: F401  # each adds its commands to main_app
from deal_pipeline.cli.data import data_app
from deal_pipeline.cli.lineage import lineage_app, task_app
from deal_pipeline.cli.live import feedback_app, rollout_app
from deal_pipeline.cli.model import model_app
from deal_pipeline.cli.server import server_app
from deal_pipeline.cli.session import main_app
from deal_pipeline.cli.version import version_app

TOPICS = {
    "Learn": ("demo", "init", "check", "adapt"),
    "Look and answer": ("status", "ui", "predict", "serve"),
    "Versions and lineages": ("version", "lineage", "task", "data"),
    "Live traffic": ("monitor", "rollout", "feedback"),
    "Around it": ("server", "model"),
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
    help="Fine-tune one LoRA adapter again whenever new labelled data arrives; each version passes a gate first.",
    epilog="Exit codes: 0 done, 1 failed, 2 wrong use, 3 rejected by the gate or stopped before the end, "
    "130 stopped by Ctrl-C.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(main_app)
for name, group in {
    "version": version_app,
    "lineage": lineage_app,
    "task": task_app,
    "data": data_app,
    "rollout": rollout_app,
    "feedback": feedback_app,
    "server": server_app,
    "model": model_app,
}.items():
    app.add_typer(group, name=name)


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
    # The interpreter's last collections would look at every module of torch, Prefect and MLflow, to free nothing.
    atexit.register(gc.freeze)
    app()
