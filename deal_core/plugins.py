"""Classes that are found by name: this project's own, and those of other packages, by entry points."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from deal_core.errors import ConfigError, in_one_line
from deal_core.safe_text import brief


@cache
def _installed(group: str, places: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """The entry points of the packages in these places (`sys.path`). Reading them takes about 50 ms."""
    return tuple(entry_points(group=group))


@dataclass(frozen=True, kw_only=True)
class Plugins:
    """The classes of one kind. Nothing of them is imported before `load`.

    Attributes:
        kind: What a class is, for messages: "Strategy".
        setting: The setting that names one: "strategy".
        group: The group of entry points; an entry point's name is the class's name.
        own: This project's classes, by name, and those that `register` added. Another package cannot replace them.
    """

    kind: str
    setting: str
    group: str
    own: dict[str, str]

    def register(self, name: str, value: str) -> None:
        """Make a class ("package.module:Class") known to this process alone, without an entry point."""
        self.own.setdefault(name, value)

    def find(self) -> dict[str, EntryPoint]:
        """Return every class that can be used, by name, this project's first."""
        own = {name: EntryPoint(name, value, self.group) for name, value in self.own.items()}
        others = {point.name: point for point in _installed(self.group, tuple(sys.path))}
        return {**own, **{name: point for name, point in others.items() if name not in own}}

    def entry(self, name: str) -> EntryPoint:
        """Return the entry point called `name`.

        Raises:
            ConfigError: There is none.
        """
        if name in self.own:  # the entry points of other packages need not be read
            return EntryPoint(name, self.own[name], self.group)
        points = self.find()
        if name not in points:
            raise ConfigError(
                f"{self.setting} is {name!r}; give {', '.join(points)}, or install the package that has it."
            )
        return points[name]

    def load(self, name: str, parent: type[Any]) -> type[Any]:
        """Return the class called `name`, a subclass of `parent`.

        Raises:
            ConfigError: There is no such class, or its package cannot be used.
        """
        entry = self.entry(name)
        try:
            loaded = entry.load()
        except Exception as error:
            raise ConfigError(
                f"{self.kind} {name!r} ({entry.value}) cannot be imported: {in_one_line(error)}"
            ) from error
        if not (isinstance(loaded, type) and issubclass(loaded, parent) and getattr(loaded, "name", None) == name):
            raise ConfigError(
                f"{entry.value} is no subclass of {parent.__name__} with the name {name!r}; mend its package."
            )
        return loaded


def check_options(owner: str, kind: type[Any] | None, options: Mapping[str, Any]) -> Any:
    """Return the options of a class that was found by name, checked; those that are not given have their defaults.

    Args:
        owner: Whose options they are, for messages: "Strategy 'ewc'".
        kind: The class of the options, made by `deal_core.limits.settings`; None: the owner takes none.
        options: What was given.

    Raises:
        ConfigError: There is no such option, or a value does not fit. The message names it, and what may be given.
    """
    takes = [] if kind is None else [option.name for option in fields(kind)]
    if unknown := [name for name in options if name not in takes]:
        raise ConfigError(
            f"{owner} has no option {', '.join(map(brief, unknown))}; it takes {', '.join(takes) or 'none'}."
        )
    return None if kind is None else kind(**options)
