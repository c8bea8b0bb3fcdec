"""The frame of every command: home folder, screen, error message and exit code.

`@command` gives a function the options --home, --json and --debug and makes it a command of `deal`. The function's
return type says what --json prints: `CommandResult[AdaptResult]` prints the fields of `AdaptResult`. Of several types,
`Annotated[WatchResult, "with --watch"]` says when it is this one. The JSON schemas of the site are made from
the return types.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, TypeVar

import typer
from rich.console import RenderableType
from typer import Option

from deal_core.errors import ConfigError, in_one_line
from deal_core.safe_text import brief, printable, printable_json, without_secrets
from deal_pipeline.cli.console import Screen

if TYPE_CHECKING:
    from deal_pipeline.home import Home
    from deal_pipeline.lineage import Lineage
    from infra.store.base import ObjectStore

FAILED, WRONG_USE, REJECTED, STOPPED = 1, 2, 3, 130

HomeOption = Annotated[
    Path | None,
    Option(
        "--home",
        metavar="DIR",
        help="Folder that holds everything [DEAL_HOME, else ./deal-home].",
        show_default=False,
        rich_help_panel="Common",
    ),
]
Json = Annotated[bool, Option("--json", help="Print JSON and nothing else.", rich_help_panel="Common")]
Debug = Annotated[bool, Option("--debug", help="Show tracebacks.", rich_help_panel="Common")]


def _lineage(default: str) -> Any:
    return Option(
        "--lineage",
        "-l",
        envvar="DEAL_LINEAGE",
        show_envvar=False,
        help="Name of the lineage.",
        show_default=f"DEAL_LINEAGE, else {default}",
    )


LineageOption = Annotated[str, _lineage("the only lineage")]
"""A lineage that exists; "" is the default, for which `command` puts in the home's only lineage."""
SpecLineage = Annotated[str | None, _lineage("the spec's, else the only lineage")]
"""A lineage that may be new, or stand in a spec. A command gets the name, or None if none was given."""
Settings = Annotated[
    list[str] | None,
    Option(
        "--set",
        metavar="KEY=VALUE",
        help="Any setting of a spec, such as train.num_epochs=1. Repeat it for several.",
        show_default=False,
    ),
]


def _utf8(text: str) -> str:
    """Refuse a text that cannot be stored. A terminal that does not write UTF-8 gives such."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise typer.BadParameter(f"{text!r} is no UTF-8 text; let the terminal write UTF-8.") from None
    return text


def reason_option(purpose: str, **more: Any) -> Any:
    """The option of a command that stores why it was given."""
    return Option("--reason", help=f"Reason, for {purpose}.", callback=_utf8, **more)


Reason = Annotated[str, reason_option("the promotion log")]
Column = Annotated[
    str | None,
    Option("--column", help="With --data: the column that holds the texts.", show_default="found by its name"),
]

main_app = typer.Typer()
"""The commands that belong to no group, such as `deal adapt`."""
COMMON = (("home", HomeOption, None), ("as_json", Json, False), ("debug", Debug, False))
"""Name, annotation and default of the options that every command has."""

Result = TypeVar("Result")
Returned = TypeVar("Returned", bound="CommandResult[Any] | Events[Any]")
Value = TypeVar("Value", covariant=True)
Event = TypeVar("Event", contravariant=True)


@dataclass(frozen=True)
class CommandResult(Generic[Value]):
    """What a command has found, and the exit code that follows from it."""

    value: Value
    """For programs, as JSON: a pydantic model, a dataclass of the command, a list of them, or plain values."""
    shown: Iterable[RenderableType]
    """For people: lines and tables."""
    failed: bool = False
    rejected: bool = False
    """The gate has rejected a version; only looked at where nothing failed."""
    afterwards: Callable[[], str] | None = None
    """What is done when the result is printed, because it may take a while. It returns a remark, which may be empty."""

    @property
    def exit_code(self) -> int:
        """The code that the command ends with."""
        return FAILED if self.failed else REJECTED if self.rejected else 0


@dataclass(frozen=True)
class Events(Generic[Event]):
    """What a command tells that runs until it is stopped: one event after another, each at once."""

    screen: Screen

    def tell(self, event: Event, text: str) -> None:
        """Print an event: with --json as one line of JSON, else as `text`."""
        if self.screen.as_json:
            sys.stdout.write(printable_json(json.dumps(as_plain(event), ensure_ascii=False)) + "\n")
            sys.stdout.flush()
        else:
            self.screen.out.print(text, soft_wrap=True)


@dataclass(frozen=True)
class Session:
    """The home folder and the screen of a running command."""

    home: Path
    screen: Screen

    @property
    def service(self) -> Home:
        """The home's methods. Their flows run in this process, and show their stages on the screen."""
        from deal_pipeline.home import Home

        return Home.of_command(self.screen, self.run)

    def lineage(self, name: str) -> Lineage:
        """Return the methods of a lineage of this home."""
        from deal_pipeline.lineage import Lineage

        return Lineage(name, home=self.service)

    @property
    def store(self) -> ObjectStore:
        """The object store of the environment. For errors see `open_store`."""
        from infra.store.opening import open_store

        return open_store()

    def run(
        self,
        start: Callable[[], Coroutine[Any, Any, Result]],
        doing: str = "starting",
        *,
        makes_room: bool = False,
        trains: bool = False,
        in_prefect: bool = True,
    ) -> Result:
        """Run a flow and show its stages. `doing` is shown until the first stage begins; the rest is of `run_flow`."""
        from deal_pipeline.server.flow_run import run_flow

        with self.screen.working(doing):
            return run_flow(start, self.home, self.screen, makes_room=makes_room, trains=trains, in_prefect=in_prefect)

    def show(self, result: CommandResult[Any]) -> None:
        """Print a result: as JSON with --json, else as lines and tables."""
        self.screen.result(as_plain(result.value), *result.shown)


def command(
    group: typer.Typer,
    doing: str | None = None,
    *examples: str,
    name: str | None = None,
    works_without_home: bool = False,
) -> Callable[[Callable[..., Returned]], Callable[..., Returned]]:
    """Make a function a command of `group`, with the options --home, --json and --debug.

    The function gets the opened Session as its first argument, and its own options by name. It returns its result,
    which is printed and sets the exit code, or the `Events` that it has told. The type of either is read only for the
    documentation, so it may be imported under TYPE_CHECKING. A `LineageOption` that was not given is the home's only
    lineage.

    Args:
        group: the command is added to it.
        doing: what a spinner says while the function runs; None: the function shows its work itself.
        examples: command lines for the end of the help text.
        name: the command's name; None: the function's.
        works_without_home: the command has an answer where nothing is stored, and makes no home folder for it. Other
            commands with an option of the kind `LineageOption` refuse to start there; all others make the folder.
    """

    def add(function: Callable[..., Returned]) -> Callable[..., Returned]:
        @functools.wraps(function)
        def run(*, home: Path | None, as_json: bool, debug: bool, **options: Any) -> None:
            with session(home, as_json, debug, makes_home=not (works_without_home or names_lineage)) as deal:
                with nullcontext() if doing is None else deal.screen.working(doing):
                    if names_lineage and not works_without_home:
                        from tasks.lineage.settings import require_any_lineage

                        require_any_lineage(deal.store)
                    if names_lineage and not options["lineage"]:
                        from tasks.lineage.settings import only_lineage

                        options["lineage"] = only_lineage(deal.store)
                    result = function(deal, **options)
                if isinstance(result, CommandResult):
                    deal.show(result)
                    if result.afterwards is not None and (remark := result.afterwards()):
                        deal.screen.said(remark)
                    if result.exit_code:
                        raise typer.Exit(result.exit_code)

        run.__annotations__ = {name: kind for name, kind in function.__annotations__.items() if name != "return"}
        kinds = inspect.get_annotations(run, eval_str=True)
        parameters = [*inspect.signature(function).parameters.values()][1:]
        own = [parameter.replace(annotation=kinds[parameter.name]) for parameter in parameters]
        names_lineage = any(parameter.annotation == LineageOption for parameter in own)
        by_name = inspect.Parameter.KEYWORD_ONLY
        common = [inspect.Parameter(name, by_name, annotation=kind, default=value) for name, kind, value in COMMON]
        signature = inspect.Signature([*(parameter.replace(kind=by_name) for parameter in own), *common])
        run.__signature__ = signature  # type: ignore[attr-defined]
        lines = "".join(f"\n\n  {example}" for example in examples)
        group.command(name, epilog=f"Examples:{lines}" if examples else None)(run)
        return function

    return add


@contextmanager
def session(home: Path | None, as_json: bool, debug: bool, *, makes_home: bool = True) -> Iterator[Session]:
    """Prepare the home folder (`enter_home`). Turn an error inside into one line and an exit code."""
    from deal_pipeline.server.embedded import enter_home, explained

    screen = Screen(as_json=as_json)
    folder: Path | None = None
    try:
        _require_time_zone()
        folder = enter_home(home, makes_home=makes_home)
        yield Session(home=folder, screen=screen)
    except (typer.Exit, typer.Abort):
        raise
    except KeyboardInterrupt:
        screen.error("Stopped; the same command goes on from the last checkpoint.", "stopped")
        raise typer.Exit(STOPPED) from None
    except Exception as error:
        if debug:
            sys.stderr.write(printable(without_secrets(traceback.format_exc())))
        problem = explained(error, folder, "--debug")
        screen.error(in_one_line(problem), problem.code)
        raise typer.Exit(WRONG_USE if isinstance(problem, ConfigError) else FAILED) from None


def _require_time_zone() -> None:
    """Refuse a local time zone that Python does not show times in."""
    try:
        datetime.now().astimezone()
    except ValueError:
        raise ConfigError(
            f"TZ is {brief(os.environ.get('TZ'))}, which is no time zone; set it to one such as Europe/Berlin or UTC."
        ) from None


def as_plain(value: Any) -> Any:
    """Models and dataclasses as plain values; other values as they are. Importing pydantic would slow `--help`."""
    if isinstance(value, list | tuple):
        return [as_plain(part) for part in value]
    if dataclasses.is_dataclass(value):
        return {name: as_plain(part) for name, part in vars(value).items()}
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else value
