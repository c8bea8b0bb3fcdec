"""Benchmarks, and the methods that `deal` is compared with.

Every process that imports this package knows its strategies and scores. `pip install --editable ./benchmarks` makes
them known to every command of `deal`, from the same list.
"""

from __future__ import annotations

from configparser import ConfigParser
from pathlib import Path

from deal_core.selection import PLUGINS as SCORES
from deal_core.strategies import PLUGINS as STRATEGIES

ENTRY_POINTS = Path(__file__).with_name("entry_points.txt")


def register() -> None:
    """Make the strategies and scores of ENTRY_POINTS known to this process."""
    groups = ConfigParser(delimiters=("=",))
    groups.read_string(ENTRY_POINTS.read_text(encoding="utf-8"))
    for plugins in (STRATEGIES, SCORES):
        for name, value in groups[plugins.group].items():
            plugins.register(name, value)


register()
