"""ELLA: a new update is kept small where the earlier updates together are large (arXiv 2601.02232)."""

from __future__ import annotations

import torch
from peft import PeftModel
from torch import Tensor

from deal_core.strategies.inc_lora import IncLora
from deal_core.strategies.strategy import MethodState, TaskContext


class Ella(IncLora):
    """IncLoRA with the penalty λ‖ΔW_new ⊙ W_past‖²_F, W_past = Σ_i ΔW_i, over all modules."""

    name = "ella"
    reads = ("rivals.ella_weight",)

    def prepare(self, model: PeftModel, state: MethodState | None, context: TaskContext) -> None:
        """Form the sum of the earlier updates, M×O×I per stack."""
        super().prepare(model, state, context)
        self.scale = context.adapter.scale_alpha / context.adapter.rank
        self.w_past = [self.scale * b_past @ a_past for a_past, b_past in self.past]

    def penalty(self) -> Tensor | None:
        """Return λ times the squared norm of the overlap."""
        if not self.past:
            return None
        overlaps = [
            (self.scale * b @ a * w_past).square().sum()
            for a, b, w_past in zip(self.a_new, self.b_new, self.w_past, strict=True)
        ]
        return self.config.rivals.ella_weight * torch.stack(overlaps).sum()
