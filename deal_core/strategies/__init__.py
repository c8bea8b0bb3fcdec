"""Ways of learning a task, behind one interface."""

from __future__ import annotations

from deal_core.config import DealConfig
from deal_core.errors import ConfigError
from deal_core.strategies.base import MethodState, Strategy
from deal_core.strategies.deal import Deal
from deal_core.strategies.seq_lora import SeqLora

STRATEGIES: dict[str, type[Strategy]] = {cls.name: cls for cls in (Deal, SeqLora)}


def make_strategy(name: str, deal: DealConfig, seed: int) -> Strategy:
    """Return the strategy called `name`.

    Raises:
        ConfigError: There is no such strategy.
    """
    if name not in STRATEGIES:
        raise ConfigError(f"Strategy {name!r} is not known; choose one of: {', '.join(sorted(STRATEGIES))}.")
    return STRATEGIES[name](deal, seed)


__all__ = ["STRATEGIES", "MethodState", "Strategy", "make_strategy"]
