"""Strategies: ways of learning a task, with one interface.

Another package adds a strategy with an entry point in the group GROUP: its name is the strategy's name, its value the
class. `deal_core.training.conformance` checks such a class. Nothing is imported before a strategy is used. The
strategies that `deal` is compared with are in `benchmarks.method`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deal_core.method_config import MethodConfig
from deal_core.plugins import Plugins

if TYPE_CHECKING:
    from deal_core.strategies.strategy import Strategy

GROUP = "deal_pipeline.strategies"
OWN = {
    "deal": "deal_core.strategies.deal:Deal",
    "seq_lora": "deal_core.strategies.seq_lora:SeqLora",
    "replay": "deal_core.strategies.replay:Replay",
}
"""This project's strategies. Another package cannot replace them."""
PLUGINS = Plugins(kind="Strategy", setting="strategy", group=GROUP, own=dict(OWN))
"""All strategies that can be used: `PLUGINS.find()` lists them."""


def strategy_class(name: str) -> type[Strategy]:
    """Return the class of the strategy called `name`.

    Raises:
        ConfigError: There is no such strategy, or its package cannot be used.
    """
    from deal_core.strategies.strategy import Strategy

    return PLUGINS.load(name, Strategy)


def make_strategy(name: str, config: MethodConfig, seed: int) -> Strategy:
    """Return a new strategy.

    Raises:
        ConfigError: There is no such strategy, its package cannot be used, or it does not take the options.
    """
    return strategy_class(name)(config, seed)
