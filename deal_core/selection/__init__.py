"""Selection: which rows of an arrival are trained on. It comes before the strategy, so every strategy heeds it.

Another package adds a score with an entry point in the group GROUP: its name is the score's name, its value the class.
Nothing is imported before a score is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deal_core.plugins import Plugins

if TYPE_CHECKING:
    from deal_core.selection.score import RowScore

GROUP = "deal_pipeline.scores"
_SCORES = "deal_core.selection.score"
OWN = {
    "random": f"{_SCORES}:RandomScore",
    "loss": f"{_SCORES}:LossScore",
    "length": f"{_SCORES}:LengthScore",
    "difficulty": f"{_SCORES}:DifficultyScore",
    "errors": f"{_SCORES}:ErrorScore",
    "gradient": f"{_SCORES}:GradientScore",
}
"""This project's scores. Another package cannot replace them."""
PLUGINS = Plugins(kind="Score", setting="selection.score", group=GROUP, own=OWN)


def check_score_name(name: str) -> str:
    """Return the name.

    Raises:
        ConfigError: There is no such score.
    """
    return PLUGINS.entry(name).name


def score_class(name: str) -> type[RowScore]:
    """Return the class of the score called `name`.

    Raises:
        ConfigError: There is no such score, or its package cannot be used.
    """
    from deal_core.selection.score import RowScore

    return PLUGINS.load(name, RowScore)
