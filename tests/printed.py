"""Whether what commands print with --json is what the schemas of the site say."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from docs.site.printed import Printed, printed_by_command, schema_of


@functools.cache
def commands() -> dict[str, Printed]:
    """What each command prints, by its name."""
    return printed_by_command()


def command_of(words: Sequence[str]) -> str:
    """The name of the command that words call."""
    (name,) = (name for name in commands() if name.split()[1:] == list(words[: len(name.split()) - 1]))
    return name


def require_described(command: str, printed: Any) -> None:
    """Fail the test if the schema of a command does not allow what it has printed."""
    problem = best_match(validator_of(command).iter_errors(printed))
    if problem is not None:  # commands turn exceptions into messages, but not this one
        where, why = problem.json_path, problem.message[:1000]
        pytest.fail(f"no schema describes what {command} --json prints: at {where}, {why}")


@functools.cache
def validator_of(command: str) -> Draft202012Validator:
    """The validator of what a command prints. Unlike the schema's readers, it takes no field that the schema lacks."""
    return Draft202012Validator(closed(schema_of(commands()[command])))


def closed(schema: Any) -> Any:
    """The schema without room for other fields."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    parts = {name: closed(part) for name, part in schema.items()}
    return {"additionalProperties": False, **parts} if "properties" in schema else parts


def check_commands_of_this_process() -> None:
    """Check what every command prints that runs in this process from now on, also without --json."""
    from deal_pipeline.cli import session

    show, tell = session.Session.show, session.Events.tell

    def show_checked(self: session.Session, result: session.CommandResult[Any]) -> None:
        show(self, result)
        _require_running(result.value)

    def tell_checked(self: session.Events[Any], event: Any, text: str) -> None:
        tell(self, event, text)
        _require_running(event)

    session.Session.show, session.Events.tell = show_checked, tell_checked  # type: ignore[method-assign]


def _require_running(value: Any) -> None:
    from deal_pipeline.cli.session import as_plain

    if command := running_command():
        require_described(command, json.loads(json.dumps(as_plain(value))))


def running_command() -> str | None:
    """The name of the command of `deal` that runs; None: none does, or one of a test's own."""
    try:
        from typer._click.globals import get_current_context
    except ImportError:  # older releases of typer use the package
        from click import get_current_context  # type: ignore[assignment, no-redef]

    context, names = get_current_context(silent=True), []
    while context is not None:
        names.append(str(context.command.name))
        context = context.parent
    return " ".join(reversed(names)) if names and names[-1] == "deal" else None
