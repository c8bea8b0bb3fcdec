"""Kernels on the normalised spectrum (arXiv 2509.18942, Eq. 8, and the ones its ablation compares).

All are given as logarithms, so that the inverse kernel is a subtraction and nothing is divided. Arguments broadcast
against each other: singular values s (0 to 1), learnable centres c (1 at the start) and fixed widths σ.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

FLOOR = 1e-3
"""What the spline is raised by, so that its logarithm exists where it ends; where it has ended, its gain is 1."""
SMALL = 1e-6

LogKernel = Callable[[Tensor, Tensor | float, Tensor], Tensor]


def log_heat(spectrum: Tensor, centre: Tensor | float, width: Tensor) -> Tensor:
    """Heat: φ(s) = exp(−(s − c)²/(2σ²))."""
    return -((spectrum - centre) ** 2) / (2 * width**2)


def log_linear_decay(spectrum: Tensor, centre: Tensor | float, width: Tensor) -> Tensor:
    """φ(s) = x·exp(−x) with x = s/(σc): rises like s and falls off beyond s = σc."""
    x = spectrum.clamp_min(SMALL) / (width * torch.as_tensor(centre).clamp_min(SMALL))
    return x.log() - x


def log_spline(spectrum: Tensor, centre: Tensor | float, width: Tensor) -> Tensor:
    """Quadratic B-spline of u = (s − c)/σ: ¾ − u² for |u| < ½, ½(3/2 − |u|)² up to |u| = 3/2, 0 beyond."""
    u = ((spectrum - centre) / width).abs()
    outer = 0.5 * (1.5 - u).clamp_min(0) ** 2
    return (torch.where(u < 0.5, 0.75 - u**2, outer) + FLOOR).log()


LOG_KERNELS: dict[str, LogKernel] = {"heat": log_heat, "linear_decay": log_linear_decay, "spline": log_spline}
