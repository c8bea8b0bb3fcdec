"""One factor (Aᵀ or B) of a stack of modules as a network.

Shapes: M modules of one shape, N features of the side (I for A, O for B), R rank, C core slots at most.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from deal_core.adapter.retention import ControlledUpdate, SpectralRetention
from deal_core.method_config import DealConfig

TINY = 1e-12
BLOCK_BYTES = 2**23
"""Size of the block of a factor that a CPU processes at a time, so that it stays in the cache between operations.
Smaller blocks are not faster, and threads wait for each other more often."""


class FactorNetwork(nn.Module):
    """A function from the method's parameters to one factor of every module of a stack."""

    start_MNR: Tensor

    def __init__(self, start_MNR: Tensor) -> None:
        super().__init__()
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

    def pull_back(self, gradients: Sequence[Tensor]) -> None:
        """Set the parameters' gradients, given those of the loss with respect to the factor (N×R for every module).

        The gradient of the penalty is added.
        """
        for parameter in self.parameters():
            parameter.grad = None
        torch.autograd.backward([self()], [torch.stack(list(gradients)).float()])
        torch.autograd.backward(self.penalty())


class SpectralFactor(FactorNetwork):
    """Core slots are retained and, with a soft core, reshaped. Free slots learn the new task.

    Except for the offset b, the network is one matrix W (R×R) per module: O = Y·W + b with W = diag(h)·(I + Ω). The
    gains h are 1 on free slots. Free columns are then projected out of the guarded directions. `write` and `pull_back`
    compute the same as `forward` and `penalty` with their gradients, but faster: the gradients need two thin matrix
    products, and a single pass over the numbers sets them and the penalty's gradients.

    Args:
        start_MNR: The balanced factor when the task arrives, free slots already recycled.
        sigma_MR: Singular values of ΔW.
        core_MR: True for core slots, which are the leading slots.
        guarded_MNR: Orthonormal directions that free slots must not use (zero columns elsewhere), or None.
    """

    core_M1R: Tensor
    guarded_MNR: Tensor | None

    def __init__(
        self, start_MNR: Tensor, sigma_MR: Tensor, core_MR: Tensor, config: DealConfig, guarded_MNR: Tensor | None
    ) -> None:
        super().__init__(start_MNR)
        self._config = config
        self.register_buffer("core_M1R", core_MR.unsqueeze(1))
        self.register_buffer("guarded_MNR", guarded_MNR)
        is_soft = config.core == "soft"
        self.retention: SpectralRetention | None = None
        if is_soft and config.num_layers > 0:
            self.retention = SpectralRetention(sigma_MR, config.widths, config.num_layers)
        self.update = ControlledUpdate(
            start_MNR, mixing=is_soft and config.mixing, trainable_MR=None if is_soft else ~core_MR
        )

    def forward(self) -> Tensor:
        """Return O: X̂ + X̂Ω + b, free slots projected out of the guarded directions."""
        out_MNR = self.start_MNR
        if self.retention is not None:
            out_MNR = torch.where(self.core_M1R, self.retention(out_MNR), out_MNR)
        out_MNR = self.update(out_MNR)
        if self.guarded_MNR is not None:
            projected_MNR = out_MNR - self.guarded_MNR @ (self.guarded_MNR.mT @ out_MNR)
            out_MNR = torch.where(self.core_M1R, out_MNR, projected_MNR)
        return out_MNR

    def penalty(self) -> Tensor:
        """λ₁·mean_k(‖y'_k − y_k‖/(ρ‖y_k‖))^a over core slots, λ₂·mean|·|^b over Ω and the free columns of b."""
        config = self._config
        is_core_MR = self.core_M1R.squeeze(1)
        core_MR = is_core_MR.float()
        deviation_MR = (self() - self.start_MNR).square().sum(1)
        scale_MR = config.tolerance**2 * self.start_MNR.square().sum(1) + TINY
        ratio_MR = torch.where(is_core_MR, deviation_MR / scale_MR, 0.0)  # a free column may start at zero
        wall_MR = (ratio_MR + TINY) ** (config.a / 2) * core_MR
        wall = (wall_MR.sum(1) / core_MR.sum(1).clamp(min=1)).sum()
        free_M1R = 1 - core_MR.unsqueeze(1)
        size = (self.update.offset_MNR * free_M1R).abs().pow(config.b).mean((1, 2)).sum()
        total: Tensor = config.lambda1 * wall + config.lambda2 * (size + self._mixing_size())
        return total

    def _mixing_size(self) -> Tensor:
        mixing_MRR = self.update.mixing_MRR
        if mixing_MRR is None:
            return self.start_MNR.new_zeros(())
        return mixing_MRR.abs().pow(self._config.b).mean((1, 2)).sum()

    def _weight(self) -> Tensor | None:
        """W (M×R×R) as a function of g, c and Ω; None if W is the identity."""
        mixing_MRR = self.update.mixing_MRR
        if self.retention is None and mixing_MRR is None:
            return None
        rank = self.start_MNR.shape[2]
        weight_MRR = torch.eye(rank, device=self.start_MNR.device).expand(len(self.start_MNR), -1, -1)
        if mixing_MRR is not None:
            weight_MRR = weight_MRR + mixing_MRR
        if self.retention is not None:
            gains_MR = torch.where(self.core_M1R.squeeze(1), self.retention.gains(), 1.0)
            weight_MRR = gains_MR.unsqueeze(2) * weight_MRR
        return weight_MRR

    def _blocks(self) -> Iterator[tuple[slice, int]]:
        """Modules that are processed together, and the number of columns that hold all their core slots."""
        num_modules, num_features, rank = self.start_MNR.shape
        if self.start_MNR.device.type != "cpu":  # a GPU wants few kernel launches, and counting would wait for it
            yield slice(0, num_modules), rank
            return
        counts = self.core_M1R.sum((1, 2)).tolist()
        size = max(1, BLOCK_BYTES // (4 * num_features * rank))
        for first in range(0, num_modules, size):
            yield slice(first, first + size), max(counts[first : first + size])

    def _keep_out(self, values_BNR: Tensor, part: slice, num_core: int) -> None:
        """Project free columns out of the guarded directions, in place; the projection is its own transpose."""
        if self.guarded_MNR is not None and num_core:
            guarded_BNC = self.guarded_MNR[part, :, :num_core]
            inside_BCR = (guarded_BNC.mT @ values_BNR).masked_fill(self.core_M1R[part], 0.0)
            values_BNR.baddbmm_(guarded_BNC, inside_BCR, alpha=-1)

    @torch.no_grad()
    def write(self, targets: Sequence[Tensor]) -> None:
        """Write O of every module into its target (N×R)."""
        weight_MRR = self._weight()
        for part, num_core in self._blocks():
            start_BNR, offset_BNR = self.start_MNR[part], self.update.masked_offset(part)
            out_BNR = (
                start_BNR + offset_BNR
                if weight_MRR is None
                else torch.baddbmm(offset_BNR, start_BNR, weight_MRR[part], out=torch.empty_like(offset_BNR))
            )
            self._keep_out(out_BNR, part, num_core)
            for target, value in zip(targets[part], out_BNR, strict=True):
                target.copy_(value)

    def pull_back(self, gradients: Sequence[Tensor]) -> None:
        """Set the gradients of g, c, Ω and b; see `FactorNetwork.pull_back`."""
        offset, config, start_MNR = self.update.offset_MNR, self._config, self.start_MNR
        weight_MRR = self._weight()
        for parameter in self.parameters():
            if parameter is not offset:
                parameter.grad = None
        if offset.grad is None:
            offset.grad = torch.empty_like(offset)
        grad_MNR = offset.grad  # overwritten, because new memory would cost as much as the arithmetic
        by_weight_MRR = None if weight_MRR is None else torch.empty_like(weight_MRR)
        with torch.no_grad():
            for part, num_core in self._blocks():
                grad_BNR = grad_MNR[part]
                for row, gradient in zip(grad_BNR, gradients[part], strict=True):
                    row.copy_(gradient)
                self._keep_out(grad_BNR, part, num_core)
                if num_core and config.lambda1 > 0 and config.core == "soft":
                    self._add_wall(grad_BNR, weight_MRR, part, num_core)
                if weight_MRR is not None and by_weight_MRR is not None:
                    torch.bmm(start_MNR[part].mT, grad_BNR, out=by_weight_MRR[part])
                if config.lambda2 > 0:
                    self._add_size(grad_BNR, part)
                if self.update.trainable_M1R is not None:
                    grad_BNR.mul_(self.update.trainable_M1R[part])
        if weight_MRR is not None and by_weight_MRR is not None:
            total = (weight_MRR * by_weight_MRR).sum()
            torch.autograd.backward(total + config.lambda2 * self._mixing_size())

    def _add_wall(self, grad_BNR: Tensor, weight_MRR: Tensor | None, part: slice, num_core: int) -> None:
        """Add the λ₁ term's gradient with respect to O; only core columns have one."""
        config, start_BNR = self._config, self.start_MNR[part]
        moved_BNC = self.update.offset_MNR[part, :, :num_core]
        if weight_MRR is not None:
            change_BRR = weight_MRR[part] - torch.eye(weight_MRR.shape[1], device=weight_MRR.device)
            moved_BNC = torch.baddbmm(moved_BNC, start_BNR, change_BRR[..., :num_core])
        deviation_B1C = moved_BNC.square().sum(1, keepdim=True)
        scale_B1C = config.tolerance**2 * start_BNR[..., :num_core].square().sum(1, keepdim=True) + TINY
        core_B1C, num_B11 = self.core_M1R[part, :, :num_core], self.core_M1R[part].sum(2, keepdim=True)
        ratio_B1C = torch.where(core_B1C, deviation_B1C / scale_B1C, 0.0)  # a free column may start at zero
        slope_B1C = torch.where(core_B1C, (ratio_B1C + TINY) ** (config.a / 2 - 1) / scale_B1C, 0.0)
        factor_B1C = config.lambda1 * config.a * slope_B1C / num_B11.clamp(min=1)
        grad_BNR[..., :num_core].addcmul_(moved_BNC, factor_B1C)

    def _add_size(self, grad_BNR: Tensor, part: slice) -> None:
        """Add the λ₂ term's gradient with respect to b; only free columns have one."""
        config, offset_BNR = self._config, self.update.offset_MNR[part]
        slope_BNR = offset_BNR if config.b == 2 else offset_BNR.sign() * offset_BNR.abs().pow(config.b - 1)
        factor_B1R = ~self.core_M1R[part] * (config.lambda2 * config.b / offset_BNR[0].numel())
        grad_BNR.addcmul_(slope_BNR, factor_B1R)
