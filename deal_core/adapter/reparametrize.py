"""LoRA factors as functions of the method's parameters: materialise before a step, pull gradients back after it.

The network acts on weights, not on activations. Training runs on the adapter's ordinary lora_A and lora_B; once per
optimiser step, the accumulated gradients of the factors go back through the network. The parameters are not part of
the trained model, so wrappers of the model do not see them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn

from deal_core.adapter.factor import FactorNetwork, HaarFactor, LiteralFactor, SpectralFactor
from deal_core.adapter.spectrum import Spectrum, count_core_slots, decompose
from deal_core.adapter.stack import LoraStack, draw_seeds
from deal_core.method_config import DealConfig


class Reparametrization(nn.Module):
    """The factor networks of all stacks of one adapter.

    A checkpoint keeps its state: the parameters and the arrival's constants (spectrum, seeds, core mask).
    """

    def __init__(self, stacks: Sequence[LoraStack], config: DealConfig, generator: torch.Generator) -> None:
        super().__init__()
        self._stacks = tuple(stacks)
        self.num_core_slots: dict[str, int] = {}
        """Core slots of every module, by name; empty for the literal form."""
        self.is_full: tuple[str, ...] = ()
        """Names of the modules whose core was cut to leave the free share."""
        self._power = self._recycled_power = 0.0
        factory = _literal_sides if config.form == "literal" else self._spectral_sides
        self._pairs = [factory(stack, config, generator) for stack in self._stacks]
        self.sides = nn.ModuleList(nn.ModuleList(pair) for pair in self._pairs)

    def _spectral_sides(
        self, stack: LoraStack, config: DealConfig, generator: torch.Generator
    ) -> tuple[FactorNetwork, FactorNetwork]:
        a_MRI, b_MOR = stack.read()
        spectrum = decompose(a_MRI, b_MOR)
        rank = a_MRI.shape[1]
        num_free = max(1, round(config.free_share * rank))
        count_M = count_core_slots(spectrum.sigma_MR, config.energy, num_free)
        wanted_M = count_core_slots(spectrum.sigma_MR, config.energy, 0)
        self.num_core_slots.update(zip(stack.names, count_M.tolist(), strict=True))
        self.is_full += tuple(n for n, c, w in zip(stack.names, count_M, wanted_M, strict=True) if c < w)
        core_MR = torch.arange(rank, device=count_M.device).unsqueeze(0) < count_M.unsqueeze(1)
        y_A, y_B = spectrum.factors() if config.balanced else (a_MRI.mT.clone(), b_MOR)
        power_MR = spectrum.sigma_MR.double().square()
        self._power += float(power_MR.sum())
        if config.recycle:
            self._recycled_power += float((power_MR * ~core_MR).sum())
            y_A, y_B = _recycle(y_A, y_B, core_MR, config, generator)
        elif config.balanced:
            y_A, y_B = _rescale(spectrum, core_MR, config)
        guarded = spectrum.right_MIR * core_MR.unsqueeze(1) if config.project and config.balanced else None
        # Aᵀ gets A's memory layout, so that copies between the two are contiguous
        y_A, guarded = _as_lora_a(y_A), None if guarded is None else _as_lora_a(guarded)
        factory = HaarFactor if config.kernel == "haar" else SpectralFactor
        a_side = factory(y_A, spectrum.sigma_MR, core_MR, config, guarded, is_trained=config.sides != "B")
        b_side = factory(y_B, spectrum.sigma_MR, core_MR, config, None, is_trained=config.sides != "A")
        return a_side, b_side

    @property
    def recycled_share(self) -> float:
        """Share of the adapter's norm that recycling removed before the first step."""
        return math.sqrt(self._recycled_power / self._power) if self._power > 0 else 0.0

    @torch.no_grad()
    def materialise(self) -> None:
        """Write A' and B' into the adapter's own parameters."""
        for stack, networks in zip(self._stacks, self._pairs, strict=True):
            for network, targets in zip(networks, stack.targets(), strict=True):
                network.write(targets)

    def pull_back(self, *, penalised: bool = False) -> None:
        """Set the parameters' gradients by passing the factors' gradients back through the networks (chain rule).

        With `penalised`, the gradient of `penalty` is added in the same pass over the numbers.
        """
        for stack, networks in zip(self._stacks, self._pairs, strict=True):
            for network, gradients in zip(networks, stack.target_gradients(), strict=True):
                if network.is_trained:
                    network.pull_back(gradients, penalised=penalised)

    def penalty(self) -> Tensor:
        """λ₁ and λ₂ terms of Eq. 12, summed over the modules; a scalar with a gradient."""
        return torch.stack([network.penalty() for networks in self._pairs for network in networks]).sum()

    @torch.no_grad()
    def synchronise(self) -> None:
        """Take every constant and parameter from the first process, bit for bit."""
        for tensor in self.state_dict().values():
            tensor.copy_(broadcast(tensor.contiguous()))


def _as_lora_a(y_MIR: Tensor) -> Tensor:
    return y_MIR.mT.contiguous().mT


def _rescale(spectrum: Spectrum, core_MR: Tensor, config: DealConfig) -> tuple[Tensor, Tensor]:
    """The balanced factors, with free slots rescaled: one factor as long as a seed of PEFT, the other with the rest.

    The adapter's output does not change. No slot is near zero in both factors, because such a slot could not learn.
    """
    length = config.seed_scale / math.sqrt(3)  # of n numbers drawn from U(−1/√n, 1/√n)
    root_M1R = spectrum.sigma_MR.sqrt().unsqueeze(1)
    long_M1R = torch.where(core_MR.unsqueeze(1), root_M1R, length)
    short_M1R = torch.where(core_MR.unsqueeze(1), root_M1R, spectrum.sigma_MR.unsqueeze(1) / length)
    if config.sides == "A":
        return spectrum.right_MIR * short_M1R, spectrum.left_MOR * long_M1R
    return spectrum.right_MIR * long_M1R, spectrum.left_MOR * short_M1R


def _recycle(
    y_A: Tensor, y_B: Tensor, core_MR: Tensor, config: DealConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Set the free slots of one factor to zero and seed the other as PEFT seeds a new LoRA, U(−1/√n, 1/√n), scaled.

    By default B's free slots are zero and A's are seeded. If only A is trained, the roles swap: with B at zero, A would
    never receive a gradient.
    """
    core_M1R = core_MR.unsqueeze(1)
    if config.sides == "A":
        seeds = config.seed_scale * draw_seeds(y_B, y_B.shape[2], generator)
        return torch.where(core_M1R, y_A, 0.0), torch.where(core_M1R, y_B, seeds)
    seeds = config.seed_scale * draw_seeds(y_A, y_A.shape[1], generator)
    return torch.where(core_M1R, y_A, seeds), torch.where(core_M1R, y_B, 0.0)


def _literal_sides(
    stack: LoraStack, config: DealConfig, generator: torch.Generator
) -> tuple[FactorNetwork, FactorNetwork]:
    del generator  # the literal form seeds nothing
    a_MRI, b_MOR = stack.read()
    return (
        LiteralFactor(a_MRI.mT, config, is_trained=config.sides != "B"),
        LiteralFactor(b_MOR, config, is_trained=config.sides != "A"),
    )
