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
from deal_core.base_model.load import BaseModel
from deal_core.config import AdapterConfig, MethodConfig, TrainConfig
from deal_core.data.collate import AnswerCollator
from deal_core.data.schema import TaskSchema
from deal_core.strategies.rehearsal import Rehearsal

Stores = Literal["nothing", "data"]
SEED_STRIDE = 1_000_003
"""Between the seeds of two arrivals; the seeds that people give are closer to each other."""
STORED_ROWS = "rows."
"""What the names of tensors that hold rows of old tasks begin with."""


@dataclass(frozen=True, kw_only=True)
class MethodState:
    """What a strategy carries from one task to the next beside the adapter itself.

    Attributes:
        strategy: Name of the strategy that wrote it.
        stores: Whether it keeps anything of the old tasks' data.
        tensors: Its tensors, by name.
        num_arrivals: Arrivals that the adapter has learned, by whichever strategies.
    """

    strategy: str
    stores: Stores
    tensors: dict[str, Tensor] = field(default_factory=dict)
    num_arrivals: int = 1

    @property
    def num_bytes(self) -> int:
        """Size of what is carried, in bytes."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    @property
    def stored_rows(self) -> dict[str, Tensor]:
        """Those of its tensors that hold rows of old tasks: what strategies that keep rows leave to one another."""
        return {name: value for name, value in self.tensors.items() if name.startswith(STORED_ROWS)}


@dataclass(frozen=True, kw_only=True)
class TaskContext:
    """What a strategy may look at when a task arrives.

    Attributes:
        base: The base model and its tokenizer.
        task: How a row of the new task becomes a prompt.
        rows: Its training rows, columns input and output.
        encoded: The same rows as tokens, columns prompt_ids, answer_ids, length and is_prompt_cut.
        old_tasks: Instructions and labels of the tasks that the parent has learned, in order; never their rows.
        adapter: Shape of a lineage's first adapter.
        train: How long and how fast.
    """

    base: BaseModel
    task: TaskSchema
    rows: Dataset
    encoded: Dataset
    old_tasks: tuple[TaskSchema, ...]
    adapter: AdapterConfig
    train: TrainConfig

    def collator(self) -> AnswerCollator:
        """Return what pads rows of this base model to a batch."""
        return AnswerCollator(self.base.tokenizer, is_seq2seq=self.base.kind == "seq2seq")


class Strategy:
    """Hooks around the one training loop; this base is plain LoRA, continued from the parent's factors.

    Order of calls: prepare, then for every optimiser step rehearsal and before_step (gradients are accumulated), the
    gradient of penalty, clip, step, after_step; finish at the end.
    """

    name: ClassVar[str]
    reads: ClassVar[tuple[str, ...]] = ()
    """Parts ("deal") or single settings ("rivals.ewc_weight") of MethodConfig that decide what it does."""
    revision: ClassVar[int] = 1
    """Raised whenever the same settings give other results: the benchmark then takes no stored cell for it."""
    model: PeftModel
    stacks: tuple[LoraStack, ...]
    context: TaskContext

    def __init__(self, config: MethodConfig, seed: int) -> None:
        self.config = config
        self.seed = seed

    @property
    def stores(self) -> Stores:
        """What is kept of old tasks' data."""
        return "nothing"

    @classmethod
    def num_new_slots(cls, adapter: AdapterConfig) -> int:
        """Return by how many slots a later task widens the adapter: none, or the lineage's versions would grow."""
        del adapter
        return 0

    def prepare(self, model: PeftModel, state: MethodState | None, context: TaskContext) -> None:
        """Take the model, its adapter already loaded; `state` is None for the first task of a lineage.

        Where another strategy made the parent, `state` has the stored rows alone.
        """
        self.model = model
        self.stacks = collect_stacks(model)
        self.context = context
        self.num_arrivals = 0 if state is None else state.num_arrivals

    def fresh(self) -> torch.Generator:
        """Return what draws new slots' seeds on the CPU, so alike on every device: others for every arrival."""
        return torch.Generator().manual_seed(self.seed + SEED_STRIDE * self.num_arrivals)

    def parameters(self) -> Sequence[nn.Parameter]:
        """Return what the optimiser holds."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def rehearsal(self) -> Rehearsal | None:
        """Return the questions about old tasks whose loss is added to every optimiser step's."""
        return None

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
        rehearsal = self.rehearsal()
        return () if rehearsal is None else (rehearsal.describe(),)

    @torch.no_grad()
    def finish(self) -> MethodState:
        """End the task; the adapter then holds the result."""
        return MethodState(strategy=self.name, stores=self.stores)
