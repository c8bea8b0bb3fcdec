"""What the site's build makes from the code: settings, environment variables, commands, Python, what --json prints."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import typer.main
from pydantic_core import PydanticUndefined
from pydantic_settings import BaseSettings
from typer.cli import get_docs_for_click

from deal_core.evaluation import metrics
from deal_core.general import suites
from deal_core.strategies import OWN
from deal_pipeline.cli.app import app
from docs.site.docstrings import docstring_of, docstring_of_constant
from docs.site.printed import json_schemas
from docs.site.python_api import python_page
from infra import settings as environment
from tasks.lineage.consolidation import ConsolidatePolicy
from tasks.lineage.retrain import RetrainPolicy
from tasks.lineage.settings import WatchedLineage
from tasks.spec import AdaptSpec

LIMITS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "more than {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "less than {}",
}
NO_LIMITS = (2**31 - 1, 2**32 - 1)
TYPES = {
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "boolean": "true or false",
    "array": "list",
    "object": "mapping",
}

COMMON = ("--home DIR", "--json", "--debug", "-h, --help")
COMMON_TEXT = (
    "Every command takes `--home DIR` (the folder that holds everything: DEAL_HOME, else ./deal-home), `--json`\n"
    "(print JSON and nothing else), `--debug` (show tracebacks) and `-h`. They are left out below."
)
"""Options of every command."""
OWN_CODE = {metrics: "MODULES_VARIABLE", suites: "FOLDER_VARIABLE"}
"""Constants with the names of variables that let a worker run code of one's own. `infra.settings` has no such."""


def settings_page() -> str:
    """Return the page of all settings: a table for each section of a spec, from the fields and their docstrings."""
    schema = AdaptSpec.model_json_schema()
    sections = {name: kind for name in schema["properties"] if (kind := _class_of(name))}
    top = {name: field for name, field in schema["properties"].items() if name not in sections}
    of_file = WatchedLineage.model_json_schema()  # what only a lineage's file has
    schema["$defs"] |= of_file["$defs"]
    for name, kind in {"retrain": RetrainPolicy, "consolidate": ConsolidatePolicy}.items():
        schema["properties"][name], sections[name] = of_file["properties"][name], kind
    tasks = {"tasks": of_file["properties"]["tasks"]}
    lines = [
        "# Settings of a spec",
        "",
        "The fields of a spec and of a lineage's file, with their defaults. [data.md](data.md) has an example.",
        "",
        "## At the top",
        "",
        *_table(AdaptSpec, top),
        "",
        "## Only in a lineage's file",
        "",
        *_table(WatchedLineage, tasks),
    ]
    for section, kind in sections.items():
        part = schema["$defs"][_reference(schema["properties"][section])]
        summary = " ".join(docstring_of(kind).split("\n\n")[0].split())
        lines += ["", f"## {section}", "", summary, "", *_table(kind, part["properties"])]
    return "\n".join(lines) + "\n"


def environment_page() -> str:
    """Return the page of all environment variables: a table for each subject of `infra.settings`."""
    lines = [
        "# Environment variables",
        "",
        "Where things are, and how this machine works, is set in the environment. What is learned is set in a",
        "[spec](settings.md).",
    ]
    for kind in vars(environment).values():
        if not (isinstance(kind, type) and kind.__module__ == environment.__name__ and kind.__doc__):
            continue
        names = kind.__annotations__  # its own fields, without those of its parents
        if not names or not issubclass(kind, BaseSettings):
            continue
        title, _, more = " ".join(kind.__doc__.split()).partition(". ")
        lines += ["", f"## {title.rstrip('.')}", "", *([more, ""] if more else [])]
        lines += ["| variable | default | meaning |", "|---|---|---|"]
        for name in names:
            field = kind.model_fields[name]
            variable = field.validation_alias or f"{kind.model_config['env_prefix']}{name}".upper()
            default = "–" if field.default in (None, PydanticUndefined) else _plain(field.default)
            meaning = " ".join(
                docstring_of(kind, name).replace(f" ({variable})", "").replace(f"({variable}, ", "(").split()
            )
            lines.append(f"| `{variable}` | {default} | {meaning} |")
    lines += ["", "## Code of your own, on the worker", "", "| variable | default | meaning |", "|---|---|---|"]
    for module, name in OWN_CODE.items():
        meaning = " ".join(docstring_of_constant(module, name).removeprefix("Environment variable: ").split())
        lines.append(f"| `{vars(module)[name]}` | – | {meaning[0].upper()}{meaning[1:]} |")
    lines += ["", "## Options of commands", "", "| variable | stands for | meaning |", "|---|---|---|"]
    lines += sorted({f"| `{option.envvar}` | `{option.opts[0]}` | {option.help} |" for option in _options(app)})
    return "\n".join(lines) + "\n"


def _options(app: typer.Typer) -> Iterator[Any]:
    """Yield the options and arguments of all commands that a variable can give."""
    commands = [typer.main.get_command(app)]
    for command in commands:
        commands += getattr(command, "commands", {}).values()
        yield from (option for option in command.params if option.envvar)


def _plain(default: Any) -> str:
    values = sorted(default) if isinstance(default, frozenset) else [default]
    return ", ".join(f"`{value}`" for value in values)


def commands_page() -> str:
    """Return the page of all commands, as Typer writes it, with their options but those that every command takes."""
    command = typer.main.get_command(app)
    with command.make_context("deal", [], resilient_parsing=True) as context:
        page = get_docs_for_click(obj=command, ctx=context, name="deal", title="Commands")
    top, *commands = re.split(r"(?=^## )", page, flags=re.MULTILINE)
    commands = [re.sub(rf"^\* `(?:{'|'.join(COMMON)})`.*\n", "", each, flags=re.MULTILINE) for each in commands]
    commands = [each.replace("**Options**:\n\n\n", "") for each in commands]  # no other options
    page = "".join([top.rstrip(), f"\n\n{COMMON_TEXT}\n\n", *commands])
    return re.sub(r"[ \t]+$", "", page, flags=re.MULTILINE).rstrip() + "\n"


def spec_schema() -> str:
    """Return the JSON schema of a spec for editors: the fields' limits, and their docstrings as descriptions.

    The schema names this project's strategies and takes those of other packages too.
    """
    schema = AdaptSpec.model_json_schema()
    del schema["description"]
    kinds = {name: _class_of(name) for name in schema["properties"]}
    for part, kind in [
        (schema, AdaptSpec),
        *((schema["$defs"][kind.__name__], kind) for kind in kinds.values() if kind is not None),
    ]:
        part["title"] = docstring_of(kind).split("\n\n")[0].replace("\n", " ")
        part.pop("description", None)
        for name, field in part["properties"].items():
            if described := docstring_of(kind, name).replace("\n", " "):
                field.pop("title", None)
                field["description"] = described
            else:  # a section: its class says what it is, and its fields have the defaults
                field.pop("default", None)
    strategy = schema["properties"]["strategy"]
    del strategy["anyOf"]
    strategy["examples"] = [*OWN]
    strategy["type"] = ["string", "null"]
    return json.dumps(schema, ensure_ascii=False, indent=1) + "\n"


SITE_PAGES = {
    "settings.md": settings_page,
    "environment.md": environment_page,
    "commands.md": commands_page,
    "python_reference.md": python_page,
    "json_schemas.json": json_schemas,
    "spec.schema.json": spec_schema,
}
"""File of the site → what makes its content. Of these files `spec.schema.json` alone is stored (`make schema`)."""


def _table(kind: type, properties: Mapping[str, Any]) -> Iterator[str]:
    yield "| key | value | meaning |"
    yield "|---|---|---|"
    for name, field in properties.items():
        default = f". Default `{json.dumps(field['default'])}`" if field.get("default") is not None else ""
        cells = (f"`{name}`", _values(field) + default, docstring_of(kind, name))
        yield "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _values(field: Mapping[str, Any]) -> str:
    """The values that a field takes, in words."""
    if choices := field.get("anyOf", field.get("oneOf")):
        return " or ".join(_values(each) for each in choices if each.get("type") != "null")
    if "enum" in field or "const" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    if "$ref" in field:
        return "mapping"
    kind = TYPES[field["type"]]
    items = field.get("items", {})
    if "enum" in items:
        kind = f"list of {_values(items)}"
    limits = {name: field[name] for name in LIMITS if field.get(name, NO_LIMITS[0]) not in NO_LIMITS}
    return ", ".join([kind, *(LIMITS[name].format(limit) for name, limit in limits.items())])


def _reference(field: Mapping[str, Any]) -> str:
    choices = [field, *field.get("anyOf", ())]
    return next(str(each["$ref"]).rpartition("/")[2] for each in choices if "$ref" in each)


def _class_of(name: str) -> type | None:
    """The class of a spec's field; None: the field is no section."""
    annotation = AdaptSpec.model_fields[name].annotation
    choices = [annotation, *getattr(annotation, "__args__", ())]
    return next((each for each in choices if dataclasses.is_dataclass(each) or hasattr(each, "model_fields")), None)
