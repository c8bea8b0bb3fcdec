"""LoRA factors of a PEFT model, stacked by shape, in balanced form, and split into core and free slots.

The method processes all modules of one shape together.
Shapes: M modules of one shape, O out features, I in features, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from deal_core.errors import AdapterStateError, ConfigError

ADAPTER_NAME = "default"


@dataclass(frozen=True)
class LoraStack:
    """The M modules of one shape that carry the adapter."""

    names: tuple[str, ...]
    """The modules' names, in the model's order."""
    a_params: tuple[nn.Parameter, ...]
    """Their lora_A weights, each R×I."""
    b_params: tuple[nn.Parameter, ...]
    """Their lora_B weights, each O×R."""

    def read(self) -> tuple[Tensor, Tensor]:
        """Return copies of the factors as fp32 tensors A (M×R×I) and B (M×O×R)."""
        a_MRI, b_MOR = (torch.stack([p.detach() for p in params]) for params in (self.a_params, self.b_params))
        return a_MRI.float(), b_MOR.float()

    def targets(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return views of the modules' parameters for writing: each Aᵀ (I×R) and each B (O×R)."""
        return [p.detach().mT for p in self.a_params], [p.detach() for p in self.b_params]

    def target_gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the gradients of `targets` without copying; zero if a parameter received none."""
        grads_A, grads_B = (
            [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
            for params in (self.a_params, self.b_params)
        )
        return [grad.mT for grad in grads_A], grads_B


def collect_stacks(model: PeftModel) -> tuple[LoraStack, ...]:
    """Group the adapter's modules by shape, in the order in which the shapes first appear.

    Raises:
        AdapterStateError: The model carries no LoRA module.
    """
    groups: dict[tuple[int, int], list[tuple[str, nn.Parameter, nn.Parameter]]] = {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer) and ADAPTER_NAME in module.lora_A:
            a = cast(nn.Parameter, module.lora_A[ADAPTER_NAME].weight)
            b = cast(nn.Parameter, module.lora_B[ADAPTER_NAME].weight)
            groups.setdefault((b.shape[0], a.shape[1]), []).append((name, a, b))
    if not groups:
        raise AdapterStateError("The model carries no LoRA module; attach an adapter before training it.")
    return tuple(LoraStack(*zip(*members, strict=True)) for members in groups.values())


def check_rank(stacks: Sequence[LoraStack]) -> None:
    """Refuse a rank with slots that cannot hold anything.

    Raises:
        ConfigError: The rank exceeds a module's number of features.
    """
    for stack in stacks:
        (rank, num_in), num_out = stack.a_params[0].shape, stack.b_params[0].shape[0]
        if rank > min(num_in, num_out):
            raise ConfigError(
                f"Adapter rank {rank} exceeds the size of {stack.names[0]} ({num_out}×{num_in}); "
                f"set adapter.rank to {min(num_in, num_out)} or less."
            )


def draw_seeds(like: Tensor, fan_in: int, generator: torch.Generator) -> Tensor:
    """Return U(−1/√n, 1/√n) for n inputs, as PEFT seeds a new LoRA's A, in the shape and on the device of `like`.

    The numbers are drawn on the CPU, so every device gets the same ones.
    """
    return ((torch.rand(like.shape, generator=generator) * 2 - 1) * float(fan_in**-0.5)).to(like.device)


@dataclass(frozen=True)
class Spectrum:
    """Thin singular value decomposition ΔW = P Σ Qᵀ of M adapters, singular values in descending order."""

    left_MOR: Tensor
    """P, orthonormal columns."""
    sigma_MR: Tensor
    right_MIR: Tensor
    """Q, orthonormal columns."""

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return the balanced factors Y_A = Q Σ^½ (M×I×R) and Y_B = P Σ^½ (M×O×R), with ΔW = Y_B Y_Aᵀ."""
        root_M1R = self.sigma_MR.sqrt().unsqueeze(1)
        return self.right_MIR * root_M1R, self.left_MOR * root_M1R


def decompose(a_MRI: Tensor, b_MOR: Tensor) -> Spectrum:
    """Decompose ΔW = B·A without forming ΔW: QR of each factor, then SVD of the small matrix between them.

    The result has min(R, I, O) directions per module.
    """
    q_A, r_A = torch.linalg.qr(a_MRI.float().mT)
    q_B, r_B = torch.linalg.qr(b_MOR.float())
    u, sigma, vh = torch.linalg.svd(r_B @ r_A.mT, full_matrices=False)
    return Spectrum(q_B @ u, sigma, q_A @ vh.mT)


def count_core_slots(sigma_MR: Tensor, energy: float) -> Tensor:
    """Return the number of leading directions that hold at least the share `energy` of ‖ΔW‖²_F.

    The result is an integer tensor of shape (M,). A module whose ΔW is zero has no core.
    """
    power_MR = sigma_MR.double().square()
    total_M1 = power_MR.sum(1, keepdim=True)
    below_MR = power_MR.cumsum(1) < energy * total_M1 * (1 - 1e-12)
    return torch.where(total_M1.squeeze(1) > 0, below_MR.sum(1) + 1, 0)
