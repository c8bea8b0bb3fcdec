"""One factor (Aᵀ or B) of a stack of modules as a network, and the literal form of one.

Shapes: M modules of one shape, N features of the side (I for A, O for B), R rank.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deal_core.adapter.retention import ControlledUpdate, LiteralRetention
from deal_core.config import DealConfig


class FactorNetwork(nn.Module):
    """A function from the method's parameters to one factor of every module of a stack.

    Attributes:
        is_trained: False for a side that `deal.sides` excludes; the side then has no parameters.
    """

    start_MNR: Tensor

    def __init__(self, start_MNR: Tensor, *, is_trained: bool) -> None:
        super().__init__()
        self.is_trained = is_trained
        self.register_buffer("start_MNR", start_MNR.clone())

    @abstractmethod
    def forward(self) -> Tensor:
        """Return the factor O (M×N×R)."""

    @abstractmethod
    def penalty(self) -> Tensor:
        """Return this factor's λ terms; a scalar."""

    @torch.no_grad()
    def write(self, targets: Sequence[Tensor]) -> None:
        """Write the factor of every module into its target (N×R)."""
        for target, value in zip(targets, self(), strict=True):
            target.copy_(value)

    def pull_back(self, gradients: Sequence[Tensor], *, penalised: bool) -> None:
        """Set the parameters' gradients, given those of the factor (N×R for every module).

        Args:
            gradients: Gradients of the loss with respect to the factor.
            penalised: Whether the gradient of the penalty is added.
        """
        for parameter in self.parameters():
            parameter.grad = None
        torch.autograd.backward([self()], [torch.stack(list(gradients)).float()])
        if penalised:
            torch.autograd.backward(self.penalty())


class LiteralFactor(FactorNetwork):
    """Eq. 8-12 as written, on the raw factor. The penalty is on θ₁'s deviation from its start: one on g erases Y."""

    def __init__(self, start_MNR: Tensor, config: DealConfig, *, is_trained: bool) -> None:
        super().__init__(start_MNR, is_trained=is_trained)
        self._config = config
        self.retention: LiteralRetention | None = None
        self.update: ControlledUpdate | None = None
        if is_trained:
            if config.num_layers > 0:
                self.retention = LiteralRetention(start_MNR, config.widths, config.num_layers)
            self.update = ControlledUpdate(start_MNR, mixing=config.mixing)

    def forward(self) -> Tensor:
        """Return O: X̂ + X̂Ω + b."""
        out_MNR = self.start_MNR if self.retention is None else self.retention(self.start_MNR)
        return out_MNR if self.update is None else self.update(out_MNR)

    def penalty(self) -> Tensor:
        """λ₁‖θ₁ − θ₁⁰‖_a^a + λ₂‖θ₂‖_b^b with θ₁ = {g, C} and θ₂ = {Ω, b}."""
        total = self.start_MNR.new_zeros(())
        config = self._config
        if self.retention is not None:
            for theta, start in (
                (self.retention.filters_KMJN, 1 / len(config.widths)),
                (self.retention.centres_KMJ, 1.0),
            ):
                total = total + config.lambda1 * (theta - start).abs().pow(config.a).sum()
        if self.update is not None:
            for theta in self.update.parameters():
                total = total + config.lambda2 * theta.abs().pow(config.b).sum()
        return total
