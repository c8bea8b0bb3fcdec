"""The reference of the Python API: public methods with their docstrings, and the fields of what they return."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

import griffe
from pydantic import BaseModel

from deal_pipeline import Home, Lineage, frame
from docs.site.docstrings import OURS, docstring_of
from docs.site.printed import only_for_types

HEAD = """\
# Python reference

`from deal_pipeline import Home, Lineage, frame`. [From Python](python.md) shows how they are used. Errors are
subclasses of `deal_core.errors.DealError`; each has a `code` that stays when its message is written anew.
"""


INNER = {"load", "train", "run", "computing", "of_command", "opened_with_prefect", "place"}
"""Methods of `Home` that only other parts of the project call."""


def python_page() -> str:
    """Return the page of `Lineage`, `Home`, `frame`, and of the classes of their results."""
    returned: dict[str, type] = {}
    lines = [HEAD, *_class(Lineage, returned), *_class(Home, returned)]
    lines += ["## frame", "", *_function(frame, returned)]
    lines += ["## Results", "", "`--json` of a command prints these fields."]
    for name in sorted(returned):
        lines += ["", f"### {name}", "", _in_one_line(docstring_of(returned[name])), "", *_fields(returned[name])]
    return "\n".join(lines) + "\n"


def _class(kind: type, returned: dict[str, type]) -> Iterator[str]:
    yield from (f"## {kind.__name__}", "")
    yield from _described(inspect.getdoc(kind) or "")
    for name, member in vars(kind).items():
        function = member.fget if isinstance(member, property) else member
        if name.startswith("_") or not inspect.isfunction(inspect.unwrap(function)) or not inspect.getdoc(function):
            continue
        if name in INNER:
            continue
        yield from (f"### {kind.__name__}.{name}", "")
        yield from _function(function, returned, is_attribute=isinstance(member, property))


def _function(function: Callable[..., Any], returned: dict[str, type], *, is_attribute: bool = False) -> Iterator[str]:
    unwrapped = inspect.unwrap(function)
    module = sys.modules[unwrapped.__module__]
    vars(module).update(only_for_types(module))
    returning = types.SimpleNamespace(__annotations__={"return": unwrapped.__annotations__["return"]})
    for kind in _classes(typing.get_type_hints(returning, vars(module))["return"]):
        returned[kind.__name__] = kind
    if not is_attribute:
        yield from ("```python", _signature(unwrapped), "```", "")
    yield from _described(inspect.getdoc(function) or "")


def _signature(function: Callable[..., Any]) -> str:
    """The call as it stands in the source, one parameter a line if it is long."""
    signature, parts = inspect.signature(function), list[str]()
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY and not any(part.startswith("*") for part in parts):
            parts.append("*")
        if name != "self":
            star = "*" if parameter.kind is parameter.VAR_POSITIONAL else ""
            default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
            parts.append(f"{star}{name}: {parameter.annotation}{default}")
    result = f" -> {signature.return_annotation}"
    line = f"{function.__name__}({', '.join(parts)}){result}"
    joined = ",\n    ".join(parts)
    return line if len(line) <= 100 else f"{function.__name__}(\n    {joined},\n){result}"


def _described(text: str) -> Iterator[str]:
    """A docstring as Markdown: its paragraphs, and a list for each section."""
    for section in griffe.Docstring(text).parse("google", warnings=False):
        if section.kind is griffe.DocstringSectionKind.text:
            yield from (section.value, "")
        elif section.kind is griffe.DocstringSectionKind.parameters:
            yield from ("Arguments:", "")
            yield from (f"- `{each.name}`: {_in_one_line(each.description)}" for each in section.value)
            yield ""
        elif section.kind is griffe.DocstringSectionKind.returns:
            words = " ".join(_in_one_line(f"{each.annotation or ''} {each.description}") for each in section.value)
            yield from (f"Returns: {words.strip()}", "")
        elif section.kind is griffe.DocstringSectionKind.raises:
            yield from ("Errors:", "")
            yield from (f"- `{each.annotation}`: {_in_one_line(each.description)}" for each in section.value)
            yield ""
        elif section.kind is griffe.DocstringSectionKind.examples:
            examples = (part.replace("  # doctest: +SKIP", "") for _, part in section.value)
            yield from ("```python", *examples, "```", "")


def _classes(hint: Any) -> Iterator[type]:
    """The project's own classes in a type."""
    is_ours = isinstance(hint, type) and hint.__module__.partition(".")[0] in OURS
    if is_ours and (issubclass(hint, BaseModel) or dataclasses.is_dataclass(hint)):
        yield hint
    for part in typing.get_args(hint):
        yield from _classes(part)


def _fields(kind: type) -> Iterator[str]:
    names = kind.model_fields if issubclass(kind, BaseModel) else [each.name for each in dataclasses.fields(kind)]
    yield from ("| field | meaning |", "|---|---|")
    for name in names:
        yield f"| `{name}` | {_in_one_line(docstring_of(kind, name)).replace('|', chr(92) + '|')} |"


def _in_one_line(text: str) -> str:
    return " ".join(text.split())
