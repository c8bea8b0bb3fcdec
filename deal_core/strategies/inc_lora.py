"""IncLoRA: a new adapter per task beside frozen earlier ones, kept as one adapter that widens: ΔW = Σ_i B_i A_i."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft import PeftModel
from torch import Tensor, nn

from deal_core.adapter.stack import draw_seeds
from deal_core.config import AdapterConfig
from deal_core.strategies.strategy import MethodState, Strategy, TaskContext


class IncLora(Strategy):
    """Trains the slots that a task adds; those of earlier tasks stay as they are. The adapter grows with every task.

    Attributes:
        a_new: A of the new slots, M×R×I, one per stack; empty for the first task, which is plain LoRA.
        b_new: B of the new slots, M×O×R.
        past: A and B of the earlier slots, one pair per stack.
    """

    name = "inc_lora"
    revision = 2  # new slots get other seeds with every arrival

    @classmethod
    def num_new_slots(cls, adapter: AdapterConfig) -> int:
        """Every task brings a whole adapter."""
        return adapter.rank

    def prepare(self, model: PeftModel, state: MethodState | None, context: TaskContext) -> None:
        """Seed the new slots as PEFT seeds a new LoRA: A ~ U(−1/√I, 1/√I), B = 0; others than every task before."""
        super().prepare(model, state, context)
        self.a_new, self.b_new = nn.ParameterList(), nn.ParameterList()
        self.past: list[tuple[Tensor, Tensor]] = []
        if state is None:
            return
        num_new = self.num_new_slots(context.adapter)
        generator = self.fresh()
        for stack in self.stacks:
            a_MRI, b_MOR = stack.read()
            self.past.append((a_MRI[:, :-num_new], b_MOR[:, :, :-num_new]))
            self.a_new.append(nn.Parameter(draw_seeds(a_MRI[:, -num_new:], a_MRI.shape[2], generator)))
            self.b_new.append(nn.Parameter(torch.zeros_like(b_MOR[:, :, -num_new:])))
        self.after_step()

    def parameters(self) -> Sequence[nn.Parameter]:
        """Return the new slots' factors."""
        return [*self.a_new, *self.b_new] if self.past else super().parameters()

    def before_step(self) -> None:
        """Take the new slots' part of the factors' gradients."""
        for stack, a, b in zip(self.stacks, self.a_new, self.b_new, strict=False):
            grad_A, grad_B = stack.gradients()
            a.grad, b.grad = grad_A[:, -a.shape[1] :].clone(), grad_B[:, :, -b.shape[2] :].clone()

    def after_step(self) -> None:
        """Write earlier and new slots side by side."""
        for stack, (a_past, b_past), a, b in zip(self.stacks, self.past, self.a_new, self.b_new, strict=False):
            stack.write(torch.cat([a_past, a], dim=1), torch.cat([b_past, b], dim=2))

    def checkpoint(self) -> dict[str, Tensor]:
        """Return the new slots' factors."""
        named = [*((f"a.{i}", p) for i, p in enumerate(self.a_new)), *((f"b.{i}", p) for i, p in enumerate(self.b_new))]
        return {name: parameter.detach() for name, parameter in named}

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take the new slots' factors back."""
        for kind, parameters in (("a", self.a_new), ("b", self.b_new)):
            for i, parameter in enumerate(parameters):
                parameter.copy_(tensors[f"{kind}.{i}"])
        self.after_step()
