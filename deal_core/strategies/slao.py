"""SLAO: each task starts from an orthonormal basis of the last A; B is averaged over the tasks (arXiv 2512.23017)."""

from __future__ import annotations

import torch
from peft import PeftModel
from torch import Tensor

from deal_core.strategies.strategy import MethodState, Strategy, TaskContext


class Slao(Strategy):
    """Single LoRA, orthogonal initialisation, time-aware merging.

    Task t starts from A = Qᵀ of the QR of A_{t−1}ᵀ and from the B that task t−1 ended with; the version is that task's
    A with B_merged ← B_merged + (B − B_merged)/√t. The unmerged B rides in the state.
    """

    name = "slao"

    def prepare(self, model: PeftModel, state: MethodState | None, context: TaskContext) -> None:
        """Orthonormalise A and take the last task's own B back."""
        super().prepare(model, state, context)
        self._merged: list[Tensor] = []
        if state is None:
            return
        for i, stack in enumerate(self.stacks):
            a_MRI, b_MOR = stack.read()
            self._merged.append(b_MOR)
            basis_MIR, triangle_MRR = torch.linalg.qr(a_MRI.mT)
            signs_M1R = torch.where(triangle_MRR.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).unsqueeze(1)
            # a parent that another strategy made has one B: it is both
            stack.write((basis_MIR * signs_M1R).mT, state.tensors.get(f"b.{i}", b_MOR).to(b_MOR.device))

    @torch.no_grad()
    def finish(self) -> MethodState:
        """Merge B, and keep the unmerged one for the next task."""
        tensors, num_tasks = {}, self.num_arrivals + 1
        for i, stack in enumerate(self.stacks):
            a_MRI, b_MOR = stack.read()
            tensors[f"b.{i}"] = b_MOR.cpu()
            if self._merged:
                stack.write(a_MRI, self._merged[i] + (b_MOR - self._merged[i]) / num_tasks**0.5)
        return MethodState(strategy=self.name, stores=self.stores, tensors=tensors)
