"""What --json prints of every command: a page for people, and JSON schemas for programs.

Both come from the types that the commands return, and from the docstrings of these types and of their fields.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import sys
import textwrap
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

import typer.main
from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from docs.site.docstrings import docstring_of
from flows.cli.app import app
from flows.cli.session import CommandResult, Events
from tasks.lineage.settings import WatchedLineage

INTRODUCTION = """\
# JSON of the commands

With `--json` a command prints JSON on stdout and nothing else. Each section says what a command of
[commands.md](commands.md) prints. [json_schemas.json](json_schemas.json) has the same as JSON Schema: the name of a
command, such as `deal adapt`, leads to its schema. `python -m docs.site.reference` writes both files from the code.

- A field is always there, unless the table calls it optional.
- A time is ISO 8601 with its zone. A share or an accuracy is a number from 0 to 1, unless the table says otherwise.
- A mapping is a JSON object with names that depend on the data. Its values are of one type.
- Later releases may add fields, so a program should ignore fields that it does not know.
- An error is a line of JSON on stderr, `{"error": "…", "code": "…"}`, and stdout is empty. The code stays when the
  message changes. A result that is a failure, such as a refused file, is printed on stdout like any other. The
  [exit code](guide.md#look) tells them apart.
"""
OBJECTS = """\
## Objects

These stand inside of what the commands print.
"""
WORDS = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false", "null": "`null`"}
FORMATS = {"date-time": "time", "path": "path"}
PLURALS = {"whole number": "whole numbers", "number": "numbers", "text": "texts", "time": "times", "path": "paths"}
JSON_WORDS = {"None": "null", "True": "true", "False": "false"}
SETTINGS = WatchedLineage.__name__
"""The object whose parts settings.md explains."""


@dataclass(frozen=True)
class Printed:
    """What a command prints."""

    kind: Any
    """Its type."""
    are_lines: bool
    """Whether it prints a line for each event, as long as it runs."""

    @property
    def choices(self) -> Iterator[tuple[Any, str]]:
        """Yield the types of the results, and when each is printed; an empty text: otherwise."""
        is_union = get_origin(self.kind) in (Union, types.UnionType)
        for kind in get_args(self.kind) if is_union else [self.kind]:
            texts = [text for text in getattr(kind, "__metadata__", ()) if isinstance(text, str)]
            yield kind, texts[0] if texts else ""


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
    vars(module).update(_only_for_types(module))
    kind = get_type_hints(function, include_extras=True).get("return")
    if get_origin(kind) not in (CommandResult, Events):
        raise TypeError(f"{function.__name__} returns {kind}; name the type that --json prints: CommandResult[…].")
    (value,) = get_args(kind)
    return Printed(value, are_lines=get_origin(kind) is Events)


def _only_for_types(module: types.ModuleType) -> dict[str, Any]:
    """Import what a module imports under TYPE_CHECKING."""
    blocks = [node for node in ast.parse(inspect.getsource(module)).body if isinstance(node, ast.If)]
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    return {
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


def _schema_of(kind: Any) -> dict[str, Any]:
    return TypeAdapter(kind).json_schema(mode="serialization", schema_generator=_Schemas)


def json_schemas() -> str:
    """Return the JSON schema of what each command prints, by the command's name, as JSON."""
    schemas = {name: _schema_of(printed.kind) for name, printed in printed_by_command().items()}
    return json.dumps(schemas, indent=1, ensure_ascii=False) + "\n"


def json_page() -> str:
    """Return the page: a section for each command and one for each object, which everything else links to."""
    commands = {
        name: (printed, [(_schema_of(kind), when) for kind, when in printed.choices])
        for name, printed in printed_by_command().items()
    }
    objects = _objects([schema for _, choices in commands.values() for schema, _ in choices])
    of_settings = {part: name for name, field in objects[SETTINGS]["properties"].items() for part in _named(field)}
    lines, written = [INTRODUCTION], set(of_settings)
    for name, (printed, choices) in commands.items():
        lines += [f"## `{name}`", "", *_choices(choices, of_settings, are_lines=printed.are_lines), ""]
        for part in (part for schema, _ in choices for part in _named(schema) if part not in written):
            written.add(part)
            lines += _section(part, objects[part], of_settings)
    lines += [OBJECTS]
    waiting = [part for name in objects if name in written - set(of_settings) for part in _parts(objects[name])]
    for part in waiting:  # it grows
        if part not in written:
            written.add(part)
            lines += _section(part, objects[part], of_settings)
            waiting += _parts(objects[part])
    return "\n".join(lines).rstrip() + "\n"


def _objects(schemas: Iterable[Any]) -> dict[str, dict[str, Any]]:
    """All objects inside of schemas, by the names of their classes.

    Raises:
        ValueError: two classes have the same name.
    """
    objects: dict[str, dict[str, Any]] = {}
    waiting = list(schemas)
    for schema in waiting:  # it grows
        if isinstance(schema, Mapping):
            waiting += schema.values()
            if "properties" in schema and "title" in schema:
                name, own = schema["title"], {part: value for part, value in schema.items() if part != "$defs"}
                if objects.setdefault(name, own) != own:
                    raise ValueError(f"Two classes that --json prints are called {name}; give one another name.")
        elif isinstance(schema, list):
            waiting += schema
    return objects


def _named(schema: Mapping[str, Any]) -> list[str]:
    """The names of the objects that a value's schema leads to, without the objects inside of these."""
    if "$ref" in schema:
        return [str(schema["$ref"]).rpartition("/")[2]]
    if "properties" in schema:
        return [str(schema["title"])]
    inner = [*schema.get("anyOf", ()), *schema.get("prefixItems", ()), schema.get("items"), _values(schema)]
    return [name for part in inner if isinstance(part, Mapping) for name in _named(part)]


def _values(schema: Mapping[str, Any]) -> Any:
    return schema.get("additionalProperties")


def _parts(schema: Mapping[str, Any]) -> list[str]:
    return [name for field in schema["properties"].values() for name in _named(field)]


def _choices(
    choices: Sequence[tuple[Mapping[str, Any], str]], of_settings: Mapping[str, str], *, are_lines: bool
) -> Iterator[str]:
    head = "It prints one line for each event:" if are_lines else "It prints"
    if len(choices) == 1:
        words = _in_words(choices[0][0], of_settings)
        yield f"{head} {'a ' if words.startswith('list') else ''}{words}."
        return
    yield head if are_lines else "It prints one of these:"
    yield ""
    for schema, when in choices:
        shown = re.sub(r"(--[a-z]+)", r"`\1`", when)
        yield f"- {_in_words(schema, of_settings)}{f', {shown}' if shown else ''}"


def _section(name: str, schema: Mapping[str, Any], of_settings: Mapping[str, str]) -> Iterator[str]:
    yield from (f"### {name}", "", textwrap.fill(schema["description"], 120, break_on_hyphens=False), "")
    yield from ("| field | value | meaning |", "|---|---|---|")
    for field, value in schema["properties"].items():
        is_optional = field not in schema.get("required", ())
        words = _in_words(value, of_settings)
        if is_optional:  # it is left out rather than null
            words = f"optional: {words.removesuffix(' or `null`')}"
        cells = (f"`{field}`", words, value.get("description", ""))
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    yield ""


def _in_words(schema: Mapping[str, Any], of_settings: Mapping[str, str]) -> str:
    """The values that a schema allows, with links to objects."""

    def words(part: Mapping[str, Any]) -> str:
        return _in_words(part, of_settings)

    if "anyOf" in schema:
        return " or ".join(map(words, schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema.get("enum", [schema.get("const")]))
    if "$ref" in schema or "properties" in schema:
        (name,) = _named(schema)
        place = f"settings.md#{of_settings[name]}" if name in of_settings else f"#{name.lower()}"
        return f"[{name}]({place})"
    if schema.get("type") == "array":
        if "prefixItems" in schema:
            return f"list of {len(schema['prefixItems'])}: {', '.join(map(words, schema['prefixItems']))}"
        return f"list of {_plural(words(schema['items']))}"
    if schema.get("type") == "object":
        values = _values(schema)
        return f"mapping of {_plural(words(values))}" if isinstance(values, Mapping) else "mapping"
    return FORMATS.get(schema.get("format", "")) or WORDS[schema["type"]] if schema.get("type") else "any value"


def _plural(words: str) -> str:
    if " or `" in words:
        return f"({words})"
    return f"lists{words.removeprefix('list')}" if words.startswith("list of") else PLURALS.get(words, words)
