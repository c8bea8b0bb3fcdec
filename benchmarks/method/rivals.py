"""The methods that `deal` is compared with. `benchmarks/entry_points.txt` lists them.

What `tensor_numbers` says for `deal check --plan` is an upper bound.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import torch
from peft import PeftModel
from torch import Tensor, nn

from deal_core.adapter.files import MethodState
from deal_core.adapter.stack import LoraStack, draw_seeds
from deal_core.config import AdapterConfig
from deal_core.data.collate import answer_loss
from deal_core.limits import AtLeastZero, Positive, settings
from deal_core.method_config import MethodConfig
from deal_core.strategies.rehearsal import Rehearsal, RehearsedRow, with_model_targets
from deal_core.strategies.strategy import PlannedArrival, Strategy, TaskContext, TensorNumbers

NUM_FISHER_ROWS = 64
"""Rows over which the Fisher information is averaged, one gradient each."""


@torch.no_grad()
def write_factors(stack: LoraStack, a_MRI: Tensor, b_MOR: Tensor) -> None:
    """Copy factors into the modules' own parameters."""
    for param, value in zip((*stack.a_params, *stack.b_params), (*a_MRI, *b_MOR), strict=True):
        param.copy_(value)


def gradients_of(stack: LoraStack) -> tuple[Tensor, Tensor]:
    """Return copies of the gradients of A (M×R×I) and B (M×O×R); zero if a parameter received none."""
    grads_A, grads_B = stack.target_gradients()
    return torch.stack(grads_A).mT.float(), torch.stack(grads_B).float()


class IncLora(Strategy):
    """Trains only the slots that a task adds; slots of earlier tasks stay fixed: ΔW = Σ_i B_i A_i.

    The adapter grows with every task. The first task is plain LoRA.

    Attributes:
        a_new: A of the trained slots, M×R'×I, one per stack; empty if all of the adapter is trained.
        b_new: B of the trained slots, M×O×R'.
        past: A and B of the slots before them, one pair per stack.
    """

    name = "inc_lora"
    revision = 2  # new slots get other seeds with every arrival

    @classmethod
    def num_new_slots(cls, adapter: AdapterConfig) -> int:
        """Return the adapter's rank: every later task adds a whole adapter."""
        return adapter.rank

    @classmethod
    def tensor_numbers(cls, config: MethodConfig, modules: Sequence[tuple[int, int]], rank: int) -> TensorNumbers:
        """Count the factors twice: in the adapter, and as fixed and trained slots."""
        plain = super().tensor_numbers(config, modules, rank)
        return replace(plain, adapter=2 * plain.adapter, optimiser=plain.adapter + plain.optimiser)

    def prepare(self, model: PeftModel, state: MethodState | None, context: TaskContext) -> None:
        """Seed the new slots as PEFT seeds a new LoRA: A ~ U(−1/√I, 1/√I), B = 0. Every arrival gets other seeds."""
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
        self.write()

    def parameters(self) -> Sequence[nn.Parameter]:
        """Return the trained slots' factors."""
        return [*self.a_new, *self.b_new] if self.past else super().parameters()

    def before_step(self) -> None:
        """Copy the trained slots' part of the factors' gradients."""
        for stack, a, b in zip(self.stacks, self.a_new, self.b_new, strict=False):
            grad_A, grad_B = gradients_of(stack)
            a.grad, b.grad = grad_A[:, -a.shape[1] :].clone(), grad_B[:, :, -b.shape[2] :].clone()

    def after_step(self) -> None:
        """Write the adapter."""
        self.write()

    def write(self) -> None:
        """Write fixed and trained slots side by side."""
        for stack, (a_past, b_past), a, b in zip(self.stacks, self.past, self.a_new, self.b_new, strict=False):
            write_factors(stack, torch.cat([a_past, a], dim=1), torch.cat([b_past, b], dim=2))

    def checkpoint(self) -> dict[str, Tensor]:
        """Return the trained slots' factors."""
        named = [*((f"a.{i}", p) for i, p in enumerate(self.a_new)), *((f"b.{i}", p) for i, p in enumerate(self.b_new))]
        return {name: parameter.detach() for name, parameter in named}

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Restore the trained slots' factors."""
        for kind, parameters in (("a", self.a_new), ("b", self.b_new)):
            for i, parameter in enumerate(parameters):
                parameter.copy_(tensors[f"{kind}.{i}"])
        self.write()


class Slao(Strategy):
    """SLAO: single LoRA, orthogonal initialisation, time-aware merging (arXiv 2512.23017).

    Task t starts from A = Qᵀ of the QR of A_{t−1}ᵀ and from the B that task t−1 ended with. The version is that task's
    A with B_merged ← B_merged + (B − B_merged)/√t. The method state holds the unmerged B.
    """

    name = "slao"

    @classmethod
    def tensor_numbers(cls, config: MethodConfig, modules: Sequence[tuple[int, int]], rank: int) -> TensorNumbers:
        """Count the merged B as well."""
        plain = super().tensor_numbers(config, modules, rank)
        return replace(plain, adapter=plain.adapter + rank * sum(num_out for num_out, _ in modules))

    def prepare(self, model: PeftModel, state: MethodState | None, context: TaskContext) -> None:
        """Orthonormalise A and restore the last task's unmerged B."""
        super().prepare(model, state, context)
        self._merged: list[Tensor] = []
        if state is None:
            return
        for i, stack in enumerate(self.stacks):
            a_MRI, b_MOR = stack.read()
            self._merged.append(b_MOR)
            basis_MIR, triangle_MRR = torch.linalg.qr(a_MRI.mT)
            signs_M1R = torch.where(triangle_MRR.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).unsqueeze(1)
            # a parent of another strategy has a single B, used as merged and as unmerged B
            write_factors(stack, (basis_MIR * signs_M1R).mT, state.tensors.get(f"b.{i}", b_MOR).to(b_MOR.device))

    @torch.no_grad()
    def finish(self) -> MethodState:
        """Merge B, and keep the unmerged one for the next task."""
        tensors, num_tasks = {}, self.num_arrivals + 1
        for i, stack in enumerate(self.stacks):
            a_MRI, b_MOR = stack.read()
            tensors[f"b.{i}"] = b_MOR.cpu()
            if self._merged:
                write_factors(stack, a_MRI, self._merged[i] + (b_MOR - self._merged[i]) / num_tasks**0.5)
        return MethodState(strategy=self.name, stores=self.stores, tensors=tensors)


@settings("strategy_options")
class OLoraOptions:
    """Options of `o_lora`."""

    weight: AtLeastZero = 0.01
    """λ of the orthogonality."""


class OLora(IncLora):
    """O-LoRA (arXiv 2310.14152): IncLoRA with the penalty λ Σ_i Σ |A_i A_newᵀ|.

    The penalty is Eq. 7 with the absolute values of the released code. New slots read directions orthogonal to the old.
    """

    name = "o_lora"
    Options = OLoraOptions

    def penalty(self) -> Tensor | None:
        """Return λ times the sum of the absolute inner products of new and earlier rows of A."""
        if not self.past:
            return None
        overlaps = [(a_past @ a.mT).abs().sum() for (a_past, _), a in zip(self.past, self.a_new, strict=True)]
        return self.options.weight * torch.stack(overlaps).sum()


@settings("strategy_options")
class EllaOptions:
    """Options of `ella`."""

    weight: AtLeastZero = 10_000.0
    """λ of the overlap with the past."""


class Ella(IncLora):
    """ELLA (arXiv 2601.02232): IncLoRA with the penalty λ‖ΔW_new ⊙ W_past‖²_F over all modules, W_past = Σ_i ΔW_i."""

    name = "ella"
    Options = EllaOptions

    @classmethod
    def tensor_numbers(cls, config: MethodConfig, modules: Sequence[tuple[int, int]], rank: int) -> TensorNumbers:
        """Count the sum of the earlier updates as well: a whole matrix per module."""
        slots = super().tensor_numbers(config, modules, rank)
        return replace(slots, adapter=slots.adapter + sum(num_out * num_in for num_out, num_in in modules))

    def prepare(self, model: PeftModel, state: MethodState | None, context: TaskContext) -> None:
        """Form the sum of the earlier updates, M×O×I per stack."""
        super().prepare(model, state, context)
        self.scale = context.adapter.scale
        self.w_past = [self.scale * b_past @ a_past for a_past, b_past in self.past]

    def penalty(self) -> Tensor | None:
        """Return λ times the squared norm of the overlap."""
        if not self.past:
            return None
        overlaps = [
            (self.scale * b @ a * w_past).square().sum()
            for a, b, w_past in zip(self.a_new, self.b_new, self.w_past, strict=True)
        ]
        return self.options.weight * torch.stack(overlaps).sum()


@settings("strategy_options")
class EwcOptions:
    """Options of `ewc`."""

    weight: AtLeastZero = 100.0
    """λ of the quadratic penalty."""


class Ewc(Strategy):
    """EWC (arXiv 1612.00796): SeqLoRA with the penalty λ/2 Σ_i F_i (θ_i − θ*_i)² on the factors.

    θ* are the parent's factors. F is the sum, over the tasks, of the diagonal Fisher information after each task. This
    is Huszár's form: one quadratic term around the newest optimum, so the state does not grow.
    """

    name = "ewc"
    Options = EwcOptions

    @classmethod
    def tensor_numbers(cls, config: MethodConfig, modules: Sequence[tuple[int, int]], rank: int) -> TensorNumbers:
        """Count the Fisher information and the parent's factors as well."""
        plain = super().tensor_numbers(config, modules, rank)
        return replace(plain, adapter=3 * plain.adapter)

    def prepare(self, model: PeftModel, state: MethodState | None, context: TaskContext) -> None:
        """Load the Fisher information of the earlier tasks and remember the parent's factors."""
        super().prepare(model, state, context)
        self.fisher = {} if state is None or state.strategy != self.name else state.tensors
        self.anchors = {name: p.detach().clone() for name, p in self._named()} if self.fisher else {}

    def _named(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def penalty(self) -> Tensor | None:
        """Return the quadratic term, a function of the factors."""
        if not self.anchors:
            return None
        terms = [
            (self.fisher[name].to(p.device) * (p - self.anchors[name]).square()).sum() for name, p in self._named()
        ]
        return self.options.weight / 2 * torch.stack(terms).sum()

    def finish(self) -> MethodState:
        """Add the squared gradients of the answers' log-likelihood on the task's own rows."""
        self.model.eval()
        collate, device = self.context.collator(), next(self.model.parameters()).device
        chosen = list(range(len(self.context.encoded)))
        random.Random(self.seed).shuffle(chosen)
        chosen = chosen[:NUM_FISHER_ROWS]
        fisher = {
            name: self.fisher[name].to(p.device).clone() if self.fisher else torch.zeros_like(p)
            for name, p in self._named()
        }
        for i in chosen:
            self.model.zero_grad()
            inputs = {key: value.to(device) for key, value in collate([self.context.encoded[i]]).items()}
            torch.autograd.backward(answer_loss(self.model, inputs))
            for name, p in self._named():
                if p.grad is not None:
                    fisher[name] += p.grad.square() / len(chosen)
        self.model.zero_grad()
        return MethodState(strategy=self.name, stores=self.stores, tensors={k: v.cpu() for k, v in fisher.items()})


@settings("strategy_options")
class LwfOptions:
    """Options of `lwf`."""

    weight: AtLeastZero = 1.0
    """Weight of the distillation."""
    temperature: Positive = 2.0
    """T of the distillation."""


class Lwf(Strategy):
    """LwF (arXiv 1606.09282): SeqLoRA with T²·KL(parent ‖ model) at the answers of a few new rows per step."""

    name = "lwf"
    reads = ("rehearsal.per_step",)
    Options = LwfOptions

    @classmethod
    def rehearsed_per_step(cls, config: MethodConfig, arrival: PlannedArrival) -> int:
        """Return how many of the new rows a step has once more."""
        return config.rehearsal.per_step if arrival.old_tasks else 0

    @classmethod
    def num_answered(cls, config: MethodConfig, arrival: PlannedArrival) -> int:
        """Return the number of new rows: the parent answers all of them."""
        del config
        return arrival.num_rows if arrival.old_tasks else 0

    def prepare(self, model: PeftModel, state: MethodState | None, context: TaskContext) -> None:
        """Ask the parent about the new task's rows."""
        super().prepare(model, state, context)
        self._rehearsal: Rehearsal | None = None
        if state is None:
            return
        rows = [RehearsedRow(row["prompt_ids"], row["answer_ids"]) for row in context.encoded]
        temperature = self.options.temperature
        rows = with_model_targets(
            model, context.collator(), rows, lambda logits_KV, _: (logits_KV / temperature).softmax(-1)
        )
        self._rehearsal = Rehearsal(
            [rows],
            context.collator(),
            num_rows=self.config.rehearsal.per_step,
            weight=self.options.weight,
            temperature=self.options.temperature,
            seed=self.seed,
        )

    def rehearsal(self) -> Rehearsal | None:
        """Return the parent's answers on the new rows."""
        return self._rehearsal
