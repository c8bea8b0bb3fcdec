"""Pages that are generated from the code: every setting of a spec, and every command."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import griffe
import typer.main
from typer.cli import get_docs_for_click

from flows.cli.app import app
from tasks.lineage.retrain import RetrainPolicy
from tasks.lineage.settings import WatchedLineage
from tasks.spec import AdaptSpec

LIMITS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "more than {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "less than {}",
}
NO_LIMITS = (2**31 - 1, 2**53, -(2**53))
TYPES = {
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "boolean": "true or false",
    "array": "list",
    "object": "mapping",
}


def settings_page() -> str:
    """Return the page of all settings: a table for each section of a spec, from the fields and their docstrings."""
    schema = AdaptSpec.model_json_schema()
    sections = {name: kind for name in schema["properties"] if (kind := _class_of(name))}
    top = {name: field for name, field in schema["properties"].items() if name not in sections}
    of_file = WatchedLineage.model_json_schema()  # what only a lineage's file has
    schema["properties"]["retrain"] = of_file["properties"]["retrain"]
    schema["$defs"] |= of_file["$defs"]
    sections["retrain"] = RetrainPolicy
    lines = [
        "# Settings of a spec",
        "",
        "The fields of a spec and of a lineage's file, with their defaults. The page is generated from the code. The "
        "[guide](guide.md) has an example.",
        "",
        "## At the top",
        "",
        *_table(AdaptSpec, top),
    ]
    for section, kind in sections.items():
        part = schema["$defs"][_reference(schema["properties"][section])]
        summary = " ".join((_text(kind) or "").split("\n\n")[0].split())
        lines += ["", f"## {section}", "", summary, "", *_table(kind, part["properties"])]
    return "\n".join(lines) + "\n"


def commands_page() -> str:
    """Return the page of all commands with their options, as Typer writes it."""
    command = typer.main.get_command(app)
    with command.make_context("deal", [], resilient_parsing=True) as context:
        return get_docs_for_click(obj=command, ctx=context, name="deal", title="Commands")


def _table(kind: type, properties: Mapping[str, Any]) -> Iterator[str]:
    yield "| key | value | meaning |"
    yield "|---|---|---|"
    for name, field in properties.items():
        default = f". Default `{json.dumps(field['default'])}`" if field.get("default") is not None else ""
        cells = (f"`{name}`", _values(field) + default, _text(kind, name))
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


@functools.cache
def _source(module: str) -> griffe.Module:
    file = Path(str(sys.modules[module].__file__))
    return griffe.visit(module, filepath=file, code=file.read_text(encoding="utf-8"))


def _text(kind: type, name: str | None = None) -> str:
    """The docstring of a class, or of its field; an inherited field has its parent's."""
    for each in kind.__mro__:
        if each.__module__.partition(".")[0] in ("deal_core", "tasks"):
            found = _source(each.__module__)[each.__name__]
            found = found if name is None else found.members.get(name)
            if found is not None and found.docstring:
                return str(found.docstring.value)
    return ""
