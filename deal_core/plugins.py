"""Classes that are found by name: this project's own, and those of other packages, by entry points."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from deal_core.errors import ConfigError, in_one_line


@cache
def _installed(group: str, places: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """The entry points of the packages in these places (`sys.path`). Reading them takes about 50 ms."""
    del places
    return tuple(entry_points(group=group))


@dataclass(frozen=True, kw_only=True)
class Plugins:
    """The classes of one kind. Nothing of them is imported before `load`.

    Attributes:
        kind: What a class is, for messages: "Strategy".
        setting: The setting that names one: "strategy".
        group: The group of entry points; an entry point's name is the class's name.
        own: This project's classes, by name. Another package cannot replace them.
    """

    kind: str
    setting: str
    group: str
    own: Mapping[str, str]

    def find(self) -> dict[str, EntryPoint]:
        """Return every class that can be used, by name, this project's first."""
        own = {name: EntryPoint(name, value, self.group) for name, value in self.own.items()}
        others = _installed(self.group, tuple(sys.path))
        return {**own, **{each.name: each for each in others if each.name not in own}}

    def entry(self, name: str) -> EntryPoint:
        """Return the entry point called `name`.

        Raises:
            ConfigError: There is none.
        """
        if name in self.own:
            return EntryPoint(name, self.own[name], self.group)
        known = self.find()
        if name not in known:
            raise ConfigError(f"{self.setting} is {name!r}; give {', '.join(known)}.")
        return known[name]

    def load(self, name: str, parent: type[Any]) -> type[Any]:
        """Return the class called `name`, a subclass of `parent`.

        Raises:
            ConfigError: There is no such class, or its package cannot be used.
        """
        entry = self.entry(name)
        try:
            found = entry.load()
        except Exception as error:
            raise ConfigError(
                f"{self.kind} {name!r} ({entry.value}) cannot be imported: {in_one_line(error)}"
            ) from error
        if not (isinstance(found, type) and issubclass(found, parent) and getattr(found, "name", None) == name):
            raise ConfigError(
                f"{entry.value} is no subclass of {parent.__name__} with the name {name!r}; mend its package."
            )
        return found
