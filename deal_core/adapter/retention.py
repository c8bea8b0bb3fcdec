"""Retention network and controlled update: what of the old spectrum a new task keeps (arXiv 2509.18942, Eq. 8-11).

Shapes: M modules of one shape, N features of the side (I for A, O for B), R rank, J kernel widths, K layers.

Kernels are logarithms, so that the inverse kernel is a subtraction. Their arguments broadcast against each other:
singular values s (0 to 1), learnable centres c (1 at the start) and fixed widths σ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

LogKernel = Callable[[Tensor, Tensor | float, Tensor], Tensor]
START_CENTRE = 1.0


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

    def forward(self, y_MNR: Tensor) -> Tensor:
        """Scale each direction of Y by its gain."""
        return y_MNR * self.gains().unsqueeze(1)


class ControlledUpdate(nn.Module):
    """Eq. 11: O = X̂ + X̂Ω + b. Ω (M×R×R) and b (M×N×R) are zero at the start, so O = X̂ before the first step.

    With `mixing`, Ω is trained as well as b. `trainable_MR` is True for slots whose column of b may change; None: all.
    """

    trainable_M1R: Tensor | None

    def __init__(self, start_MNR: Tensor, *, mixing: bool, trainable_MR: Tensor | None = None) -> None:
        super().__init__()
        num_modules, _, rank = start_MNR.shape
        self.offset_MNR = nn.Parameter(torch.zeros_like(start_MNR))
        self.mixing_MRR = nn.Parameter(start_MNR.new_zeros(num_modules, rank, rank)) if mixing else None
        self.register_buffer("trainable_M1R", None if trainable_MR is None else trainable_MR.float().unsqueeze(1))

    def forward(self, retained_MNR: Tensor) -> Tensor:
        """Return O (M×N×R)."""
        out_MNR = retained_MNR + self.masked_offset()
        return out_MNR if self.mixing_MRR is None else out_MNR + retained_MNR @ self.mixing_MRR

    def masked_offset(self, part: slice = slice(None)) -> Tensor:
        """Return b of some modules, with zeros for slots whose column may not change."""
        offset_MNR = self.offset_MNR[part]
        return offset_MNR if self.trainable_M1R is None else offset_MNR * self.trainable_M1R[part]
