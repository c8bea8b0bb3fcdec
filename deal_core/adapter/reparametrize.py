"""LoRA factors as functions of the method's parameters: materialise before a step, pull gradients back after it.

The network acts on weights, not on activations. Training runs on the adapter's ordinary lora_A and lora_B; once per
optimiser step, the accumulated gradients of the factors go back through the network. The parameters are not part of
the trained model, so wrappers of the model do not see them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate.utils import broadcast
from torch import nn

from deal_core.adapter.factor import SpectralFactor
from deal_core.adapter.stack import LoraStack, count_core_slots, decompose, draw_seeds
from deal_core.method_config import DealConfig


class Reparametrization(nn.Module):
    """The networks of all factors of one adapter.

    A checkpoint keeps its state: the parameters and the arrival's constants (spectrum, seeds, core mask).
    """

    def __init__(self, stacks: Sequence[LoraStack], config: DealConfig, generator: torch.Generator) -> None:
        super().__init__()
        self._stacks = tuple(stacks)
        self.num_core_slots: dict[str, int] = {}
        """Core slots of every module, by name."""
        self.full_modules: tuple[str, ...] = ()
        """Names of the modules whose core was cut to leave the free share."""
        self._energy = torch.zeros(2, dtype=torch.float64)
        """‖ΔW‖²_F of the cores and of the whole adapter, over all modules."""
        self._pairs = [self.networks_of(stack, config, generator) for stack in self._stacks]
        self.sides = nn.ModuleList(nn.ModuleList(pair) for pair in self._pairs)

    def networks_of(
        self, stack: LoraStack, config: DealConfig, generator: torch.Generator
    ) -> tuple[SpectralFactor, SpectralFactor]:
        """Return the networks of a stack's A and B."""
        spectrum = decompose(*stack.read())
        sigma_MR, names, rank = spectrum.sigma_MR, stack.names, spectrum.sigma_MR.shape[1]
        num_free = max(1, round(config.free_share * rank))
        wanted_M = count_core_slots(sigma_MR, config.energy)
        count_M = wanted_M.clamp(max=rank - num_free)
        self.num_core_slots.update(zip(names, count_M.tolist(), strict=True))
        self.full_modules += tuple(n for n, c, w in zip(names, count_M, wanted_M, strict=True) if c < w)
        core_MR = torch.arange(rank, device=count_M.device).unsqueeze(0) < count_M.unsqueeze(1)
        energy_MR = sigma_MR.double() ** 2
        self._energy += torch.stack([(energy_MR * core_MR).sum(), energy_MR.sum()]).cpu()
        # recycling: free slots of B become zero, those of A get the seeds of a new LoRA, scaled
        y_A, y_B = spectrum.factors()
        core_M1R = core_MR.unsqueeze(1)
        seeds = config.seed_scale * draw_seeds(y_A, y_A.shape[1], generator)
        y_A, y_B = torch.where(core_M1R, y_A, seeds), torch.where(core_M1R, y_B, 0.0)
        # Aᵀ gets A's memory layout, so that copies between the two are contiguous
        y_A, guarded = (side.mT.contiguous().mT for side in (y_A, spectrum.right_MIR * core_M1R))
        return (
            SpectralFactor(y_A, sigma_MR, core_MR, config, guarded),
            SpectralFactor(y_B, sigma_MR, core_MR, config, None),
        )

    @property
    def kept_energy(self) -> float:
        """The share of the adapter's ‖ΔW‖²_F that its cores hold."""
        core, whole = self._energy.tolist()
        return core / whole if whole else 1.0

    @torch.no_grad()
    def materialise(self) -> None:
        """Write A' and B' into the adapter's own parameters."""
        for stack, networks in zip(self._stacks, self._pairs, strict=True):
            for network, targets in zip(networks, stack.targets(), strict=True):
                network.write(targets)

    def pull_back(self) -> None:
        """Set the parameters' gradients: those of the factors passed back through the networks, and of the λ terms."""
        for stack, networks in zip(self._stacks, self._pairs, strict=True):
            for network, gradients in zip(networks, stack.target_gradients(), strict=True):
                network.pull_back(gradients)

    @torch.no_grad()
    def synchronise(self) -> None:
        """Take every constant and parameter from the first process, bit for bit."""
        for tensor in self.state_dict().values():
            tensor.copy_(broadcast(tensor.contiguous()))
