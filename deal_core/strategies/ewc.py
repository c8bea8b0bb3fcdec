"""EWC: parameters that mattered to earlier tasks are held where they were (arXiv 1612.00796)."""

from __future__ import annotations

import random

import torch
from peft import PeftModel
from torch import Tensor, nn

from deal_core.data.collate import answer_loss
from deal_core.strategies.strategy import MethodState, Strategy, TaskContext

NUM_FISHER_ROWS = 64
"""Rows over which the Fisher information is averaged, one gradient each."""


class Ewc(Strategy):
    """SeqLoRA with the penalty λ/2 Σ_i F_i (θ_i − θ*_i)² on the factors.

    θ* are the parent's factors and F the sum over tasks of the diagonal Fisher information after each (one quadratic
    term around the newest optimum, Huszár's form of the method, so that what is kept does not grow).
    """

    name = "ewc"
    reads = ("rivals.ewc_weight",)

    def prepare(self, model: PeftModel, state: MethodState | None, context: TaskContext) -> None:
        """Take over the information of the earlier tasks and remember where the factors stand."""
        super().prepare(model, state, context)
        self.fisher = {} if state is None or state.strategy != self.name else state.tensors
        self.anchors = {name: p.detach().clone() for name, p in self._named()} if self.fisher else {}

    def _named(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def penalty(self) -> Tensor | None:
        """Return the quadratic term; its gradient goes to the factors themselves."""
        if not self.anchors:
            return None
        terms = [
            (self.fisher[name].to(p.device) * (p - self.anchors[name]).square()).sum() for name, p in self._named()
        ]
        return self.config.rivals.ewc_weight / 2 * torch.stack(terms).sum()

    def finish(self) -> MethodState:
        """Add the squared gradients of the answers' log-likelihood on the task's own rows."""
        self.model.eval()
        collate, device = self.context.collator(), next(self.model.parameters()).device
        chosen = list(range(len(self.context.encoded)))
        random.Random(self.seed).shuffle(chosen)
        chosen = chosen[:NUM_FISHER_ROWS]
        fisher = {name: self.fisher[name].to(p.device).clone() if self.fisher else torch.zeros_like(p)
                  for name, p in self._named()}  # fmt: skip
        for i in chosen:
            self.model.zero_grad()
            inputs = {key: value.to(device) for key, value in collate([self.context.encoded[i]]).items()}
            torch.autograd.backward(answer_loss(self.model, inputs))
            for name, p in self._named():
                if p.grad is not None:
                    fisher[name] += p.grad.square() / len(chosen)
        self.model.zero_grad()
        return MethodState(strategy=self.name, stores=self.stores, tensors={k: v.cpu() for k, v in fisher.items()})
