"""Selection: which rows of an arrival are trained on. It comes before the strategy, so every strategy heeds it.

Another package adds a score with an entry point in the group GROUP: its name is the score's name, its value the class.
`deal_core.selection.conformance` checks such a class. Nothing is imported before a score is used.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from deal_core.errors import ConfigError, in_one_line

if TYPE_CHECKING:
    from deal_core.selection.score import RowScore

GROUP = "deal_pipeline.scores"
SCORES = "deal_core.selection.scores"
OWN = {
    "random": f"{SCORES}:RandomScore", "loss": f"{SCORES}:LossScore", "length": f"{SCORES}:LengthScore",
    "difficulty": f"{SCORES}:DifficultyScore", "errors": f"{SCORES}:ErrorScore",
}  # fmt: skip
"""This project's scores. Another package cannot replace them."""


def find_scores() -> dict[str, EntryPoint]:
    """Return every score that can be used, by name, this project's first."""
    own = {name: EntryPoint(name, value, GROUP) for name, value in OWN.items()}
    return {**own, **{each.name: each for each in entry_points(group=GROUP) if each.name not in own}}


def check_score_name(name: str) -> str:
    """Return the name.

    Raises:
        ConfigError: There is no such score.
    """
    _find(name)
    return name


def _find(name: str) -> EntryPoint:
    if name in OWN:
        return EntryPoint(name, OWN[name], GROUP)
    known = find_scores()
    if name not in known:
        raise ConfigError(f"selection.score is {name!r}; give {', '.join(known)}.")
    return known[name]


def score_class(name: str) -> type[RowScore]:
    """Return the class of the score called `name`.

    Raises:
        ConfigError: There is no such score, or its package cannot be used.
    """
    from deal_core.selection.score import RowScore

    entry = _find(name)
    try:
        found = entry.load()
    except Exception as error:
        raise ConfigError(f"Score {name!r} ({entry.value}) cannot be imported: {in_one_line(error)}") from error
    if not (isinstance(found, type) and issubclass(found, RowScore) and found.name == name):
        raise ConfigError(f"{entry.value} is no subclass of RowScore with the name {name!r}; mend its package.")
    return found
