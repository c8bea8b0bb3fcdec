"""The interface behind which every way of learning a task stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn

from deal_core.adapter.stack import LoraStack, collect_stacks
from deal_core.config import DealConfig

Stores = Literal["nothing", "data", "features"]


@dataclass(frozen=True, kw_only=True)
class MethodState:
    """What a strategy carries from one task to the next beside the adapter itself.

    Attributes:
        strategy: Name of the strategy that wrote it.
        stores: Whether it keeps anything of the old tasks' data.
        tensors: Its tensors, by name.
    """

    strategy: str
    stores: Stores
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Size of what is carried, in bytes."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


class Strategy:
    """Hooks around the one training loop; this base is plain LoRA, continued from the parent's factors.

    Order of calls: prepare, rows, then for every optimiser step before_step (gradients are accumulated), the gradient
    of penalty, clip, step, after_step; finish at the end.
    """

    name: ClassVar[str]
    stores: ClassVar[Stores] = "nothing"
    model: PeftModel
    stacks: tuple[LoraStack, ...]

    def __init__(self, deal: DealConfig, seed: int) -> None:
        self.deal = deal
        self.seed = seed

    def prepare(self, model: PeftModel, state: MethodState | None) -> None:
        """Take the model, its adapter already loaded; `state` is None for the first task of a lineage."""
        self.model = model
        self.stacks = collect_stacks(model)

    def rows(self, rows: Dataset) -> Dataset:
        """Return the rows to train on."""
        return rows

    def parameters(self) -> Sequence[nn.Parameter]:
        """Return what the optimiser holds."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def penalty(self) -> Tensor | None:
        """Return a term of the loss that is added once per optimiser step."""
        return None

    def before_step(self) -> None:
        """Turn the adapter's accumulated gradients into gradients of `parameters()`."""

    def after_step(self) -> None:
        """Bring the adapter in line with the parameters that were just stepped."""

    def checkpoint(self) -> dict[str, Tensor]:
        """Return the tensors that a resumed run needs beside the adapter and the optimiser."""
        return {}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `checkpoint` returned."""

    def notes(self) -> tuple[str, ...]:
        """Return what a person should know about how this task was learned."""
        return ()

    @torch.no_grad()
    def finish(self) -> MethodState:
        """End the task; the adapter then holds the result."""
        return MethodState(strategy=self.name, stores=self.stores)
