"""One factor (Aᵀ or B) of a stack of modules as a network: retention, controlled update, projection, regulariser.

Shapes: M modules of one shape, N features of the side (I for A, O for B), R rank.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from deal_core.adapter.retention import HaarRetention, LiteralRetention, SpectralRetention
from deal_core.adapter.update import ControlledUpdate
from deal_core.config import DealConfig

TINY = 1e-12


class FactorNetwork(nn.Module):
    """A function from the method's parameters to one factor of every module of a stack.

    Attributes:
        is_trained: False for a side that the setting leaves alone; it then has no parameters.
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


class SpectralFactor(FactorNetwork):
    """Core slots are retained and, where the core is soft, reshaped; free slots learn the new task.

    Args:
        start_MNR: The factor when the task arrives, free slots already recycled.
        sigma_MR: Singular values of ΔW.
        core_MR: True for core slots.
        guarded_MNR: Orthonormal directions that free slots are kept out of (zero columns elsewhere), or None.
        is_trained: Whether this side is updated.
    """

    core_M1R: Tensor
    guarded_MNR: Tensor | None

    def __init__(
        self,
        start_MNR: Tensor,
        sigma_MR: Tensor,
        core_MR: Tensor,
        config: DealConfig,
        guarded_MNR: Tensor | None,
        *,
        is_trained: bool,
    ) -> None:
        super().__init__(start_MNR, is_trained=is_trained)
        self._config = config
        self.register_buffer("core_M1R", core_MR.unsqueeze(1))
        self.register_buffer("guarded_MNR", guarded_MNR)
        self.retention: SpectralRetention | HaarRetention | None = None
        self.update: ControlledUpdate | None = None
        if is_trained:
            is_soft = config.core == "soft"
            if is_soft and config.num_layers > 0:
                self.retention = (
                    HaarRetention(start_MNR, config.num_layers) if config.kernel == "haar"
                    else SpectralRetention(sigma_MR, config.kernel, config.widths, config.num_layers)
                )  # fmt: skip
            self.update = ControlledUpdate(
                start_MNR, mixing=is_soft and config.mixing, trainable_MR=None if is_soft else ~core_MR
            )

    def forward(self) -> Tensor:
        """Return O: X̂ + X̂Ω + b, free slots projected out of the guarded directions."""
        out_MNR = self.start_MNR
        if self.retention is not None:
            out_MNR = torch.where(self.core_M1R, self.retention(out_MNR), out_MNR)
        if self.update is not None:
            out_MNR = self.update(out_MNR)
        if self.guarded_MNR is not None:
            projected_MNR = out_MNR - self.guarded_MNR @ (self.guarded_MNR.mT @ out_MNR)
            out_MNR = torch.where(self.core_M1R, out_MNR, projected_MNR)
        return out_MNR

    def penalty(self) -> Tensor:
        """λ₁·mean_k(‖y'_k − y_k‖/(ρ‖y_k‖))^a over core slots, λ₂·mean|·|^b over Ω and the free columns of b."""
        if self.update is None:
            return self.start_MNR.new_zeros(())
        config = self._config
        core_MR = self.core_M1R.squeeze(1).float()
        deviation_MR = (self() - self.start_MNR).square().sum(1)
        scale_MR = config.tolerance**2 * self.start_MNR.square().sum(1) + TINY
        wall_MR = (deviation_MR / scale_MR + TINY) ** (config.a / 2) * core_MR
        wall = (wall_MR.sum(1) / core_MR.sum(1).clamp(min=1)).sum()
        free_M1R = 1 - core_MR.unsqueeze(1)
        size_M = (self.update.offset_MNR * free_M1R).abs().pow(config.b).mean((1, 2))
        if self.update.mixing_MRR is not None:
            size_M = size_M + self.update.mixing_MRR.abs().pow(config.b).mean((1, 2))
        total: Tensor = config.lambda1 * wall + config.lambda2 * size_M.sum()
        return total


class LiteralFactor(FactorNetwork):
    """Eq. 8-12 as written, on the raw factor; deviations of θ₁ from its start, since a penalty on g itself erases Y."""

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
