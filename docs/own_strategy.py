"""A strategy in a package of its own: L2-SP (arXiv 1802.01483) pulls the adapter back to its parent's factors.

The package's pyproject.toml names it; then `strategy: l2_sp` works in a spec, and `--set strategy=l2_sp` in a command:

    [project.entry-points."deal_pipeline.strategies"]
    l2_sp = "own_strategy:L2Sp"

A spec gives its options: `strategy_options: {weight: 0.3}`. Another key, or a value below 0, is refused.
"""

from __future__ import annotations

from peft import PeftModel
from torch import Tensor, stack

from deal_core.adapter.files import MethodState
from deal_core.limits import AtLeastZero, settings
from deal_core.strategies.strategy import Strategy, TaskContext


@settings("strategy_options")
class L2SpOptions:
    """Options of `l2_sp`."""

    weight: AtLeastZero = 0.1
    """Weight of the distance to the parent."""


class L2Sp(Strategy):
    """Adds weight · Σ (θ − θ_parent)² to the loss of every task but the first."""

    name = "l2_sp"
    Options = L2SpOptions
    revision = 1  # raise it with every change: the benchmark reuses the cells of a revision

    def prepare(self, model: PeftModel, state: MethodState | None, context: TaskContext) -> None:
        """Keep the factors that the parent left."""
        super().prepare(model, state, context)
        self.starts = [parameter.detach().clone() for parameter in self.parameters()]

    def penalty(self) -> Tensor | None:
        """Return the distance to the parent, squared and weighted."""
        if self.num_arrivals == 0:
            return None
        pairs = zip(self.parameters(), self.starts, strict=True)
        return self.options.weight * stack([(now - start).square().sum() for now, start in pairs]).sum()
