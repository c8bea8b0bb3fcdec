"""Controlled update of a retained factor (arXiv 2509.18942, Eq. 11)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ControlledUpdate(nn.Module):
    """O = X̂ + X̂Ω + b, with Ω (M×R×R) and b (M×N×R) zero at the start, so that O = X̂ before the first step.

    Args:
        start_MNR: The factor; gives shape and device.
        mixing: Whether Ω is trained; without it only b is.
        trainable_MR: True where a slot's column of b may move; None lets all of them move.
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
        """Return b of some modules, zero where a slot's column may not move."""
        offset_MNR = self.offset_MNR[part]
        return offset_MNR if self.trainable_M1R is None else offset_MNR * self.trainable_M1R[part]
