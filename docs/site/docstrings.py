"""The docstrings of classes, of their fields and of constants, read from the source: Python keeps few of them."""

from __future__ import annotations

import functools
import inspect
import sys
from pathlib import Path
from types import ModuleType

import griffe

OURS = ("deal_core", "tasks", "infra", "flows", "deal_pipeline")


def docstring_of(kind: type, name: str | None = None) -> str:
    """The docstring of a class, or of its field; an inherited field has its parent's."""
    for parent in kind.__mro__:
        if parent.__module__.partition(".")[0] in OURS:
            member = _source(parent.__module__).members.get(parent.__name__)
            if member is not None and name is not None:
                member = member.members.get(name)
            if member is not None and member.docstring:
                return inspect.cleandoc(member.docstring.value)
    return ""


def docstring_of_constant(module: ModuleType, name: str) -> str:
    """The docstring of a module's constant."""
    docstring = _source(module.__name__).members[name].docstring
    return inspect.cleandoc(docstring.value) if docstring else ""


@functools.cache
def _source(module: str) -> griffe.Module:
    file = Path(str(sys.modules[module].__file__))
    return griffe.visit(module, filepath=file, code=file.read_text(encoding="utf-8"))
