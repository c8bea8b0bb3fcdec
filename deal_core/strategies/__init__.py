"""Strategies: ways of learning a task, with one interface.

Another package adds a strategy with an entry point in the group GROUP: its name is the strategy's name, its value the
class. `deal_core.strategies.conformance` checks such a class. Nothing is imported before a strategy is used.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from deal_core.errors import ConfigError, in_one_line
from deal_core.method_config import MethodConfig

if TYPE_CHECKING:
    from deal_core.strategies.strategy import Strategy

GROUP = "deal_pipeline.strategies"
RIVALS = "deal_core.strategies.rivals"
OWN = {
    "deal": "deal_core.strategies.deal:Deal", "seq_lora": f"{RIVALS}:SeqLora", "inc_lora": f"{RIVALS}:IncLora",
    "o_lora": f"{RIVALS}:OLora", "ella": f"{RIVALS}:Ella", "ewc": f"{RIVALS}:Ewc", "lwf": f"{RIVALS}:Lwf",
    "replay": f"{RIVALS}:Replay", "slao": f"{RIVALS}:Slao",
}  # fmt: skip
"""This project's strategies. Another package cannot replace them."""


def find_strategies() -> dict[str, EntryPoint]:
    """Return every strategy that can be used, by name, this project's first."""
    own = {name: EntryPoint(name, value, GROUP) for name, value in OWN.items()}
    return {**own, **{each.name: each for each in entry_points(group=GROUP) if each.name not in own}}


def check_strategy_name(name: str) -> str:
    """Return the name.

    Raises:
        ConfigError: There is no such strategy.
    """
    _find(name)
    return name


def _find(name: str) -> EntryPoint:
    if name in OWN:
        return EntryPoint(name, OWN[name], GROUP)
    known = find_strategies()
    if name not in known:
        raise ConfigError(f"strategy is {name!r}; give {', '.join(known)}.")
    return known[name]


def strategy_class(name: str) -> type[Strategy]:
    """Return the class of the strategy called `name`.

    Raises:
        ConfigError: There is no such strategy, or its package cannot be used.
    """
    from deal_core.strategies.strategy import Strategy

    entry = _find(name)
    try:
        found = entry.load()
    except Exception as error:
        raise ConfigError(f"Strategy {name!r} ({entry.value}) cannot be imported: {in_one_line(error)}") from error
    if not (isinstance(found, type) and issubclass(found, Strategy) and found.name == name):
        raise ConfigError(f"{entry.value} is no subclass of Strategy with the name {name!r}; mend its package.")
    return found


def make_strategy(name: str, config: MethodConfig, seed: int) -> Strategy:
    """Return a new strategy; the errors are those of `strategy_class`."""
    return strategy_class(name)(config, seed)
