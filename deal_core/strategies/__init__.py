"""Strategies: ways of learning a task, with one interface."""

from __future__ import annotations

from deal_core.config import MethodConfig
from deal_core.errors import ConfigError
from deal_core.strategies.deal import Deal
from deal_core.strategies.rivals import Ella, Ewc, IncLora, Lwf, OLora, Replay, SeqLora, Slao
from deal_core.strategies.strategy import MethodState, Strategy, TaskContext

STRATEGIES: dict[str, type[Strategy]] = {
    cls.name: cls for cls in (Deal, SeqLora, IncLora, OLora, Ella, Ewc, Lwf, Replay, Slao)
}


def strategy_class(name: str) -> type[Strategy]:
    """Return the class of the strategy called `name`.

    Raises:
        ConfigError: There is no such strategy.
    """
    if name not in STRATEGIES:
        raise ConfigError(f"Strategy {name!r} is not known; choose one of: {', '.join(sorted(STRATEGIES))}.")
    return STRATEGIES[name]


def make_strategy(name: str, config: MethodConfig, seed: int) -> Strategy:
    """Return a new strategy; the errors are those of `strategy_class`."""
    return strategy_class(name)(config, seed)


__all__ = ["STRATEGIES", "MethodState", "Strategy", "TaskContext", "make_strategy", "strategy_class"]
