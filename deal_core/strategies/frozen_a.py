"""Plain LoRA whose rows A stay as the first task left them."""

from __future__ import annotations

from deal_core.strategies.strategy import Strategy


class FrozenA(Strategy):
    """Every hook does nothing but leave A out of the optimiser after the first task."""

    name = "frozen_a"
    first_is_plain = True
