"""Selection: which rows of an arrival are trained on. It comes before the strategy, so every strategy heeds it.

Another package adds a score with an entry point in the group GROUP: its name is the score's name, its value the class.
Nothing is imported before a score is used. Scores after papers are in `benchmarks.method`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deal_core.method_config import SelectionConfig
from deal_core.plugins import Plugins

if TYPE_CHECKING:
    from deal_core.selection.score import RowScore

GROUP = "deal_pipeline.scores"
OWN = {"random": "deal_core.selection.score:RandomScore"}
"""This project's scores. Another package cannot replace them."""
PLUGINS = Plugins(kind="Score", setting="selection.score", group=GROUP, own=dict(OWN))


def check_score(config: SelectionConfig) -> None:
    """Refuse a score that there is not, or options that it does not take.

    Raises:
        ConfigError: There is no such score or option, or a value does not fit.
    """
    PLUGINS.entry(config.score)
    if config.score_options:
        score_class(config.score)(config.score_options)


def score_class(name: str) -> type[RowScore]:
    """Return the class of the score called `name`.

    Raises:
        ConfigError: There is no such score, or its package cannot be used.
    """
    from deal_core.selection.score import RowScore

    return PLUGINS.load(name, RowScore)
