"""The interface of all strategies.

What a strategy needs is said by its class: what it reads, rehearses and holds. Commands read this before they know
whether anything is to be learned, so torch is imported only in functions that compute.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from deal_core.adapter.files import MethodState, Stores
from deal_core.config import AdapterConfig, TrainConfig
from deal_core.data.schema import TaskSchema
from deal_core.method_config import MethodConfig
from deal_core.plugins import check_options

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from peft import PeftModel
    from torch import Tensor, nn

    from deal_core.adapter.stack import LoraStack
    from deal_core.base_model.load import BaseModel
    from deal_core.data.collate import AnswerCollator
    from deal_core.strategies.rehearsal import Rehearsal

SEED_STRIDE = 1_000_003
"""Distance between the seeds of two arrivals; it is larger than usual distances between users' seeds."""


@dataclass(frozen=True, kw_only=True)
class TaskContext:
    """Data that a strategy may read when a task arrives."""

    base: BaseModel
    task: TaskSchema
    """How a row of the new task becomes a prompt."""
    rows: Dataset
    """Training rows of the new task, columns input and output."""
    encoded: Dataset
    """The same rows as tokens, columns prompt_ids, answer_ids, length and is_prompt_cut."""
    old_tasks: tuple[TaskSchema, ...]
    """Instructions and labels of the tasks that the parent has learned, in order; never their rows."""
    adapter: AdapterConfig
    """Shape of a lineage's first adapter."""
    train: TrainConfig

    def collator(self) -> AnswerCollator:
        """Return the collator that makes a batch of rows for this base model."""
        from deal_core.data.collate import answer_collator

        return answer_collator(
            self.base.model,
            self.base.tokenizer,
            reads_whole_rows=self.train.gradient_checkpointing or self.train.torch_compile,
            padding_free=self.train.padding_free,
        )


class KeptRows(NamedTuple):
    """The size of a task's kept rows."""

    num_rows: int
    longest_prompt: int
    """In tokens."""
    longest_answer: int


@dataclass(frozen=True, kw_only=True)
class PlannedArrival:
    """What is known of an arrival before it is learned."""

    task: TaskSchema
    old_tasks: tuple[TaskSchema, ...]
    """Empty for the first arrival of a lineage."""
    kept: Mapping[str, KeptRows] = field(default_factory=dict)
    """For each old task whose rows the parent keeps, their size."""
    num_rows: int
    """Training rows that are trained on."""
    num_steps: int
    """Optimiser steps."""


@dataclass(frozen=True, kw_only=True)
class TensorNumbers:
    """How many numbers in fp32 a strategy holds on the device, besides the base model and the activations."""

    adapter: int
    """A, B and further tensors of the method."""
    optimiser: int
    """Gradients, and AdamW's two moments."""
    arrival: int = 0
    """Used before the first step alone."""


class Strategy:
    """Hooks of the training loop. This base class is plain LoRA, continued from the parent's factors.

    Order of calls: first prepare. Then, for every optimiser step: loss of the rehearsal, before_step (gradients are
    accumulated by then), gradient of penalty, clip, step, after_step. At the end finish.
    """

    name: ClassVar[str]
    reads: ClassVar[tuple[str, ...]] = ()
    """Parts ("deal") or single settings ("rehearsal.rows") of MethodConfig that the strategy uses."""
    Options: ClassVar[type[Any] | None] = None
    """The class of the strategy's own settings, `strategy_options` in a spec. It is made by
    `deal_core.limits.settings("strategy_options")`, so it checks them; None: there are none."""
    first_is_plain: ClassVar[bool] = False
    """Whether the first version of a lineage is that of plain LoRA, if no rows are kept. The benchmark shares it."""
    revision: ClassVar[int] = 1
    """Raised when the same settings give other results; the benchmark then does not reuse older cells."""
    options: Any
    """An instance of `Options`; None: there are none."""
    model: PeftModel
    stacks: tuple[LoraStack, ...]
    context: TaskContext

    def __init__(self, config: MethodConfig, seed: int) -> None:
        self.config = config
        self.seed = seed
        self.options = self.options_of(config)

    @classmethod
    def options_of(cls, config: MethodConfig) -> Any:
        """Return an instance of `Options` with the strategy's own settings; None if it has none.

        Raises:
            ConfigError: There is no such setting, or a value does not fit.
        """
        return check_options(f"Strategy {cls.name!r}", cls.Options, config.strategy_options)

    @property
    def stores(self) -> Stores:
        """Whether the strategy keeps data of old tasks."""
        return "nothing"

    @classmethod
    def rehearsed_per_step(cls, config: MethodConfig, arrival: PlannedArrival) -> int:
        """Return how many rows of old tasks a step of this arrival has, in addition to its batch."""
        return 0

    @classmethod
    def num_answered(cls, config: MethodConfig, arrival: PlannedArrival) -> int:
        """Return how many rows of old tasks the parent answers before the first step of this arrival."""
        return 0

    @classmethod
    def tensor_numbers(cls, config: MethodConfig, modules: Sequence[tuple[int, int]], rank: int) -> TensorNumbers:
        """Return what is held on the device while a task is learned that is not a lineage's first.

        Args:
            config: The settings of the run.
            modules: (out features, in features) of every module that carries the adapter.
            rank: The adapter's rank in this training, new slots included.
        """
        factors = rank * sum(num_out + num_in for num_out, num_in in modules)
        return TensorNumbers(adapter=factors, optimiser=3 * factors)

    @classmethod
    def num_new_slots(cls, adapter: AdapterConfig) -> int:
        """Return the number of slots that a later task adds to the adapter. 0: all versions have one size."""
        return 0

    def prepare(self, model: PeftModel, state: MethodState | None, context: TaskContext) -> None:
        """Prepare for a task; the model has its adapter on. `state` is None for the first task of a lineage.

        If another strategy made the parent, `state` holds only the kept rows.
        """
        from deal_core.adapter.stack import collect_stacks

        self.model = model
        self.stacks = collect_stacks(model)
        self.context = context
        self.num_arrivals = 0 if state is None else state.num_arrivals

    def fresh(self) -> torch.Generator:
        """Return the generator of new slots' seeds. It is on the CPU, the same for every device; arrivals differ."""
        import torch

        return torch.Generator().manual_seed(self.seed + SEED_STRIDE * self.num_arrivals)

    def parameters(self) -> Sequence[nn.Parameter]:
        """Return the parameters that the optimiser trains."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def rehearsal(self) -> Rehearsal | None:
        """Return the rows of old tasks; their loss is added to every optimiser step."""
        return None

    def penalty(self) -> Tensor | None:
        """Return a loss term that is added once per optimiser step."""
        return None

    def before_step(self) -> None:
        """Turn the adapter's accumulated gradients into gradients of `parameters()`."""

    def after_step(self) -> None:
        """Update the adapter from the parameters after an optimiser step."""

    def checkpoint(self) -> dict[str, Tensor]:
        """Return the tensors that a resumed run needs in addition to the adapter and the optimiser."""
        return {}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Restore the tensors that `checkpoint` returned."""

    def notes(self) -> tuple[str, ...]:
        """Return remarks for people about how this task was learned."""
        rehearsal = self.rehearsal()
        return () if rehearsal is None else (rehearsal.describe(),)

    def finish(self) -> MethodState:
        """End the task and return the state to keep. The adapter then holds the result."""
        return MethodState(strategy=self.name, stores=self.stores)
