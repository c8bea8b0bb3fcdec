"""XGBLoRA: an arrival is learned by boosters of rank 1, one after another, in an adapter of constant rank."""

from __future__ import annotations

import math
import random
import re

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import pad

from deal_core.adapter.spectrum import decompose
from deal_core.adapter.stack import draw_seeds
from deal_core.strategies.rivals import LastSlots
from deal_core.strategies.strategy import MethodState, TaskContext


class XgbLora(LastSlots):
    """XGBLoRA (arXiv 2410.19694), extreme gradient boosting with rank-1 adaptation, on one adapter of rank R.

    Booster t draws a set S_t of layers and is trained in their modules alone, with an optimiser of its own. Then it is
    merged (the paper's Eq. 8, with a constant rate of 1):

        ΔW_t = ΔW_{t−1} + s·b_t a_t in the modules of S_t,    a_t ~ U(−1/√I, 1/√I) and b_t = 0 at its start.

    s = α/R is the adapter's scale, which all slots share. The adapter's last slot is the booster. The other R − 1 slots
    hold what was merged: the R − 1 largest directions of ΔW_t (Eckart-Young). The last booster of an arrival stays in
    its slot until the next arrival begins. The learning rate keeps its course over all boosters.

    What differs from the paper:
        - Boosters merge into the adapter, not into the base, which stays frozen and shared.
        - The sum has R − 1 directions at most. The paper's theorem, that more boosters do as well as a higher rank,
          ends there.
        - The penalty on the norms of a_t and b_t (Eq. 7) is left out. The paper does not measure it alone.

    Attributes:
        num_boosters: Boosters of this arrival: at most `rivals.xgb_boosters`, fewer if they would have no step.
        period: Optimiser steps of one booster (κ); the last booster may have fewer.
        step: Optimiser steps so far.
        lost: Share of ‖ΔW‖²_F that was left out when R − 1 directions were kept, summed over the merges.
    """

    name = "xgblora"
    reads = ("rivals.xgb_boosters", "rivals.xgb_layer_share")

    def prepare(self, model: PeftModel, state: MethodState | None, context: TaskContext) -> None:
        """Keep the parent's R − 1 largest directions, and begin the first booster in the last slot."""
        super().prepare(model, state, context)
        num_steps = context.train.num_steps(len(context.encoded))
        self.period = math.ceil(num_steps / self.config.rivals.xgb_boosters)
        self.num_boosters = math.ceil(num_steps / self.period)
        self.step, self.lost = 0, 0.0
        self._layers = list(dict.fromkeys(layer_of(name) for stack in self.stacks for name in stack.names))
        self._num_chosen = max(1, round(self.config.rivals.xgb_layer_share * len(self._layers)))
        self._is_chosen_M11: list[Tensor] = []
        for stack in self.stacks:
            a_MRI, b_MOR = stack.read()
            self.past.append((a_MRI[:, :-1], b_MOR[:, :, :-1]))
            self.a_new.append(nn.Parameter(torch.zeros_like(a_MRI[:, -1:])))
            self.b_new.append(nn.Parameter(torch.zeros_like(b_MOR[:, :, -1:])))
            self._is_chosen_M11.append(self._mark(stack.names, self._layers, a_MRI.device))
        self._merge()
        self._begin_booster(0)
        self.write()

    def before_step(self) -> None:
        """Take the booster's gradients; those of modules in other layers are zero, so AdamW leaves them as they are."""
        super().before_step()
        for a, b, is_chosen_M11 in zip(self.a_new, self.b_new, self._is_chosen_M11, strict=True):
            for parameter in (a, b):
                assert parameter.grad is not None
                parameter.grad.mul_(is_chosen_M11)

    def after_step(self) -> None:
        """Write the adapter. After a booster's last step, merge it and begin the next one, if there is one."""
        self.write()
        self.step += 1
        number, steps_of_next = divmod(self.step, self.period)
        self.starts_anew = steps_of_next == 0 and number < self.num_boosters
        if self.starts_anew:
            self._merge()
            self._begin_booster(number)
            self.write()

    @torch.no_grad()
    def _merge(self) -> None:
        """Write the R − 1 largest directions of every chosen module into `past`; other modules keep theirs."""
        total = left_out = 0.0
        for i, (stack, is_chosen_M11) in enumerate(zip(self.stacks, self._is_chosen_M11, strict=True)):
            spectrum = decompose(*stack.read())
            old_A, old_B = self.past[i]
            num_kept = old_A.shape[1]
            y_A, y_B = spectrum.truncate(num_kept).factors()
            missing = num_kept - y_A.shape[2]  # a widened adapter may have more slots than a module has features
            new_A, new_B = pad(y_A, (0, missing)).mT, pad(y_B, (0, missing))
            self.past[i] = torch.where(is_chosen_M11, new_A, old_A), torch.where(is_chosen_M11, new_B, old_B)
            power_MR = spectrum.sigma_MR.double().square()
            total += float(power_MR.sum())
            left_out += float((power_MR[:, num_kept:] * is_chosen_M11[:, 0]).sum())
        self.lost += left_out / total if total > 0 else 0.0

    @torch.no_grad()
    def _begin_booster(self, number: int) -> None:
        """Draw layers and a_t. Seed, arrival and number decide them, so a resumed run draws the same."""
        draw = random.Random(f"{self.seed} {self.num_arrivals} {number}")
        chosen = draw.sample(self._layers, self._num_chosen)
        generator = torch.Generator().manual_seed(draw.getrandbits(63))
        for i, (stack, a, b) in enumerate(zip(self.stacks, self.a_new, self.b_new, strict=True)):
            a.copy_(draw_seeds(a, a.shape[2], generator))
            b.zero_()
            self._is_chosen_M11[i] = self._mark(stack.names, chosen, a.device)

    @staticmethod
    def _mark(names: tuple[str, ...], layers: list[str], device: torch.device) -> Tensor:
        return torch.tensor([layer_of(name) in layers for name in names], device=device).view(-1, 1, 1)

    def checkpoint(self) -> dict[str, Tensor]:
        """Return the booster, what was merged, the number of steps and the lost share."""
        counts = {"step": torch.tensor(self.step), "lost": torch.tensor(self.lost, dtype=torch.float64)}
        merged = {f"past_{side}.{i}": pair[k] for i, pair in enumerate(self.past) for k, side in enumerate("ab")}
        return {**super().checkpoint(), **merged, **counts}

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Restore them, and draw the booster's layers again."""
        self.step, self.lost = int(tensors["step"]), float(tensors["lost"])
        self._begin_booster(self.step // self.period)
        self.past = [
            (tensors[f"past_a.{i}"].to(a.device), tensors[f"past_b.{i}"].to(a.device)) for i, a in enumerate(self.a_new)
        ]
        super().restore(tensors)

    def notes(self) -> tuple[str, ...]:
        """Say how the boosters were trained, and what the constant rank cost."""
        return (
            *super().notes(),
            f"boosters of rank 1: {self.num_boosters}, up to {self.period} steps each, in {self._num_chosen} of "
            f"{len(self._layers)} layers; keeping all but one direction left out {self.lost:.2%} of the adapter's "
            "squared norm, summed over the merges",
        )


def layer_of(name: str) -> str:
    """Return a module's layer: its name up to the first number (model.layers.3), or all of a name without a number."""
    found = re.match(r"(.+?\.\d+)\.", name)
    return found[1] if found else name
