"""DEAL's network for one factor (Aᵀ or B) of a stack of modules (arXiv 2509.18942, Eq. 8-12).

Shapes: M modules of one shape, B modules of a block, N features of the side (I for A, O for B), R rank, C core slots at
most, J kernel widths, K layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from deal_core.method_config import DealConfig

TINY = 1e-12
BLOCK_BYTES = 2**23
"""Size of the block of a factor that a CPU processes at a time, so that it stays in the cache between operations.
Smaller blocks are not faster, and threads wait for each other more often."""
START_CENTRE = 1.0

LogKernel = Callable[[Tensor, Tensor | float, Tensor], Tensor]
"""Logarithm of a kernel φ(s; c, σ), so that the inverse kernel is a subtraction. The arguments broadcast against each
other: singular values s (0 to 1), learnable centres c (1 at the start) and fixed widths σ."""


def log_heat(spectrum: Tensor, centre: Tensor | float, width: Tensor) -> Tensor:
    """Heat: φ(s) = exp(−(s − c)²/(2σ²))."""
    return -((spectrum - centre) ** 2) / (2 * width**2)


class SpectralRetention(nn.Module):
    """Gain h_k of every core direction as a smooth function of its singular value.

    h_k = Σ_j g_j φ_j(s_k; c_j)/φ_j(s_k; c_j⁰) with s_k = σ_k/σ_1 and c_j⁰ = 1. At the start g_j = 1/J, so h = 1 and
    nothing is lost before the first step. The gains of the K layers are multiplied; δ is the identity.
    """

    widths_J: Tensor
    normalised_MR: Tensor
    log_kernel: LogKernel = staticmethod(log_heat)

    def __init__(self, sigma_MR: Tensor, widths: Sequence[float], num_layers: int) -> None:
        super().__init__()
        shape = (num_layers, len(sigma_MR), len(widths))
        self.register_buffer("widths_J", sigma_MR.new_tensor(list(widths)))
        top_M1 = sigma_MR[:, :1]
        self.register_buffer("normalised_MR", torch.where(top_M1 > 0, sigma_MR / top_M1.clamp(min=1e-30), 0.0))
        self.filters_KMJ = nn.Parameter(sigma_MR.new_full(shape, 1 / len(widths)))
        self.centres_KMJ = nn.Parameter(sigma_MR.new_full(shape, START_CENTRE))

    def gains(self) -> Tensor:
        """Gain of every direction, shape M×R; 1 before the first step."""
        s_MR1 = self.normalised_MR.unsqueeze(-1)
        start = self.log_kernel(s_MR1, START_CENTRE, self.widths_J)
        gain_MR = torch.ones_like(self.normalised_MR)
        for filter_MJ, centre_MJ in zip(self.filters_KMJ, self.centres_KMJ, strict=True):
            ratio_MRJ = torch.exp(self.log_kernel(s_MR1, centre_MJ.unsqueeze(1), self.widths_J) - start)
            gain_MR = gain_MR * (ratio_MRJ * filter_MJ.unsqueeze(1)).sum(-1)
        return gain_MR


class ControlledUpdate(nn.Module):
    """Ω (M×R×R) and b (M×N×R) of Eq. 11, O = X̂ + X̂Ω + b. Both are zero at the start.

    With `mixing`, Ω is trained as well as b. `trainable_MR` is True for slots whose column of b may change; None: all.
    """

    trainable_M1R: Tensor | None

    def __init__(self, start_MNR: Tensor, *, mixing: bool, trainable_MR: Tensor | None = None) -> None:
        super().__init__()
        num_modules, _, rank = start_MNR.shape
        self.offset_MNR = nn.Parameter(torch.zeros_like(start_MNR))
        self.mixing_MRR = nn.Parameter(start_MNR.new_zeros(num_modules, rank, rank)) if mixing else None
        self.register_buffer("trainable_M1R", None if trainable_MR is None else trainable_MR.float().unsqueeze(1))


class SpectralFactor(nn.Module):
    """A function from the method's parameters g, c, Ω and b to one factor O of every module of a stack.

    Core slots are retained and, with a soft core, reshaped. Free slots learn the new task. Except for the offset b, the
    network is one matrix W (R×R) per module: O = Y·W + b with W = diag(h)·(I + Ω). The gains h are 1 on free slots.
    Free columns are then projected out of the guarded directions. The λ terms of Eq. 12, summed over modules, are
    λ₁·mean_k(‖y'_k − y_k‖/(ρ‖y_k‖))^a over core slots, and λ₂·mean|·|^b over Ω and over the free columns of b.

    Gradients are written out here, because autograd through O would take much longer. They need two thin matrix
    products, and a single pass over the numbers sets those of the loss and of the λ terms.

    Args:
        start_MNR: Y, the balanced factor when the task arrives, free slots already recycled.
        sigma_MR: Singular values of ΔW.
        core_MR: True for core slots, which are the leading slots.
        guarded_MNR: Orthonormal directions that free slots must not use (zero columns elsewhere), or None.
    """

    start_MNR: Tensor
    core_M1R: Tensor
    guarded_MNR: Tensor | None

    def __init__(
        self, start_MNR: Tensor, sigma_MR: Tensor, core_MR: Tensor, config: DealConfig, guarded_MNR: Tensor | None
    ) -> None:
        super().__init__()
        self._config = config
        self.register_buffer("start_MNR", start_MNR)
        self.register_buffer("core_M1R", core_MR.unsqueeze(1))
        self.register_buffer("guarded_MNR", guarded_MNR)
        is_soft = config.core == "soft"
        self.retention: SpectralRetention | None = None
        if is_soft and config.num_layers > 0:
            self.retention = SpectralRetention(sigma_MR, config.widths, config.num_layers)
        self.update = ControlledUpdate(
            start_MNR, mixing=is_soft and config.mixing, trainable_MR=None if is_soft else ~core_MR
        )

    @torch.no_grad()
    def write(self, targets: Sequence[Tensor]) -> None:
        """Write O of every module into its target (N×R)."""
        weight_MRR, trainable_M1R = self._weight(), self.update.trainable_M1R
        for part, num_core in self._blocks():
            start_BNR, out_BNR = self.start_MNR[part], self.update.offset_MNR[part]
            if trainable_M1R is not None:
                out_BNR = out_BNR * trainable_M1R[part]
            if weight_MRR is None:
                out_BNR = start_BNR + out_BNR
            else:
                out_BNR = torch.baddbmm(out_BNR, start_BNR, weight_MRR[part], out=torch.empty_like(out_BNR))
            self._keep_out(out_BNR, part, num_core)
            for target, value in zip(targets[part], out_BNR, strict=True):
                target.copy_(value)

    def pull_back(self, gradients: Sequence[Tensor]) -> None:
        """Set the gradients of g, c, Ω and b, given those of the loss with respect to O (N×R for every module).

        The gradients of the λ terms are added.
        """
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
                if by_weight_MRR is not None:
                    torch.bmm(start_MNR[part].mT, grad_BNR, out=by_weight_MRR[part])
                if config.lambda2 > 0:
                    self._add_size(grad_BNR, part)
                if self.update.trainable_M1R is not None:
                    grad_BNR.mul_(self.update.trainable_M1R[part])
        if weight_MRR is not None and by_weight_MRR is not None:
            mixing_MRR, size = self.update.mixing_MRR, start_MNR.new_zeros(())
            if mixing_MRR is not None:
                size = mixing_MRR.abs().pow(config.b).mean((1, 2)).sum()
            torch.autograd.backward((weight_MRR * by_weight_MRR).sum() + config.lambda2 * size)

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
