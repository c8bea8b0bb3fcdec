"""What --json prints of every command, as JSON schemas.

They come from the types that the commands return, and from the docstrings of these types and of their fields.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args, get_origin, get_type_hints

import typer.main
from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from deal_pipeline.cli.app import app
from deal_pipeline.cli.session import CommandResult, Events
from docs.site.docstrings import docstring_of

RESULTS = "deal_pipeline.results"
JSON_WORDS = {"None": "null", "True": "true", "False": "false"}


@dataclass(frozen=True)
class Printed:
    """What a command prints."""

    kind: Any
    """Its type."""
    are_lines: bool
    """Whether it prints a line for each event, as long as it runs."""


def printed_by_command() -> dict[str, Printed]:
    """Return what every command prints, by its name, in the order of the help. For errors see `printed_by`."""
    return {name: printed_by(function) for name, function in _functions(typer.main.get_command(app), "deal")}


def _functions(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    if not hasattr(command, "commands"):
        yield name, inspect.unwrap(command.callback)
        return
    for part in command.list_commands(None):
        yield from _functions(command.commands[part], f"{name} {part}")


def printed_by(function: Any) -> Printed:
    """Return what the function of a command prints.

    Raises:
        TypeError: its return type does not say so.
    """
    module = sys.modules[function.__module__]
    vars(module).update(only_for_types(module))
    kind = get_type_hints(function, include_extras=True).get("return")
    if get_origin(kind) not in (CommandResult, Events):
        raise TypeError(f"{function.__name__} returns {kind}; name the type that --json prints: CommandResult[…].")
    (value,) = get_args(kind)
    return Printed(value, are_lines=get_origin(kind) is Events)


def only_for_types(module: types.ModuleType) -> dict[str, Any]:
    """Import what a module imports under TYPE_CHECKING; the results of the Python API do so too."""
    blocks = [node for node in ast.parse(inspect.getsource(module)).body if isinstance(node, ast.If)]
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    if any(node.module == RESULTS for node in imports):
        results = importlib.import_module(RESULTS)
        vars(results).update(only_for_types(results))
    libraries = [name for block in blocks for node in block.body if isinstance(node, ast.Import) for name in node.names]
    return {name.asname or name.name: importlib.import_module(name.name) for name in libraries} | {
        name.name: getattr(importlib.import_module(str(node.module)), name.name)
        for node in imports
        for name in node.names
    }


class _Schemas(GenerateJsonSchema):
    """JSON schemas of printed values, with the docstrings of fields. Fields with a default are printed too."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        """Leave out titles, which only repeat the names of the fields."""
        return False

    def field_is_required(self, field: Any, total: bool) -> bool:
        """Return whether the field is always printed."""
        return field.get("serialization_exclude_if") is None

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        """Leave out defaults: what is printed is never left to them."""
        return self.generate_inner(schema["schema"])

    def model_schema(self, schema: core_schema.ModelSchema) -> JsonSchemaValue:
        """Return the schema of a pydantic model."""
        return _explained(super().model_schema(schema), schema["cls"])

    def dataclass_schema(self, schema: core_schema.DataclassSchema) -> JsonSchemaValue:
        """Return the schema of a dataclass."""
        return _explained(super().dataclass_schema(schema), schema["cls"])


def _explained(schema: JsonSchemaValue, kind: type) -> JsonSchemaValue:
    schema["description"] = _in_json_words(docstring_of(kind))
    for name, field in schema["properties"].items():
        if text := _in_json_words(docstring_of(kind, name)):
            field["description"] = text
    return schema


def _in_json_words(text: str) -> str:
    """A docstring in one line, with JSON's words for Python's values."""
    return re.sub(r"\b(None|True|False)\b", lambda word: JSON_WORDS[word[0]], " ".join(text.split()))


def schema_of(printed: Printed) -> dict[str, Any]:
    """Return the JSON schema of what a command prints; with lines, of each line."""
    return TypeAdapter(printed.kind).json_schema(mode="serialization", schema_generator=_Schemas)


def json_schemas() -> str:
    """Return the JSON schema of what each command prints, by the command's name, as JSON."""
    schemas = {name: schema_of(printed) for name, printed in printed_by_command().items()}
    return json.dumps(schemas, indent=1, ensure_ascii=False) + "\n"
