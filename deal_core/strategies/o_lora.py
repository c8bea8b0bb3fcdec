"""O-LoRA: each task's adapter reads directions orthogonal to those the earlier ones read (arXiv 2310.14152)."""

from __future__ import annotations

import torch
from torch import Tensor

from deal_core.strategies.inc_lora import IncLora


class OLora(IncLora):
    """IncLoRA with the penalty λ Σ_i Σ |A_i A_newᵀ| (its Eq. 7 with the absolute values of its released code)."""

    name = "o_lora"
    reads = ("rivals.o_lora_weight",)

    def penalty(self) -> Tensor | None:
        """Return λ times the sum of the absolute inner products of new and earlier rows of A."""
        if not self.past:
            return None
        overlaps = [(a_past @ a.mT).abs().sum() for (a_past, _), a in zip(self.past, self.a_new, strict=True)]
        return self.config.rivals.o_lora_weight * torch.stack(overlaps).sum()
