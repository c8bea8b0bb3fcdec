"""DEAL: retain the adapter's core spectrum, learn the new task in the free slots (arXiv 2509.18942)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from deal_core.adapter.method_state import MethodState, Stores
from deal_core.method_config import MethodConfig
from deal_core.strategies.strategy import OldRows, PlannedArrival, Strategy, TaskContext, TensorNumbers

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor, nn

    from deal_core.adapter.reparametrize import Reparametrization
    from deal_core.strategies.rehearsal import Rehearsal


class Deal(Strategy):
    """The first task of a lineage is plain LoRA.

    A step of a later task has its batch and questions about the old tasks; see `deal_core.strategies.rehearsal`.
    With a soft or frozen core, the parameters of the retention network are trained instead of A and B.
    """

    name = "deal"
    reads = ("deal", "rehearsal")
    memories = ("none", "tests", "rows")
    first_is_plain = True
    revision = 2  # recycled slots get other seeds with every arrival

    @property
    def stores(self) -> Stores:
        """Return "data" if the rehearsal keeps rows, or answers to texts of old tasks; else "nothing"."""
        return "data" if self.config.rehearsal.keeps_rows or self.config.rehearsal.keeps_answers else "nothing"

    @classmethod
    def old_rows(cls, config: MethodConfig) -> OldRows:
        """Return "unused" if the old tasks are asked about texts of their own."""
        return "unused" if config.rehearsal.texts == "own" else "none"

    @classmethod
    def questions_per_step(cls, config: MethodConfig, arrival: PlannedArrival) -> int:
        """Return how many questions a step asks. A task that returns is asked about only by its kept rows."""
        rehearsal = config.rehearsal
        is_asked = rehearsal.keeps_rows or any(old.name != arrival.task.name for old in arrival.old_tasks)
        return rehearsal.rows_per_step if arrival.old_tasks and is_asked and rehearsal.texts != "none" else 0

    @classmethod
    def num_answered(cls, config: MethodConfig, arrival: PlannedArrival) -> int:
        """Return how many questions the parent answers before the first step."""
        from deal_core.strategies.questions import num_answered

        return num_answered(config.rehearsal, arrival)

    @classmethod
    def tensor_numbers(cls, config: MethodConfig, modules: Sequence[tuple[int, int]], rank: int) -> TensorNumbers:
        """Count the tensors of the retention network and of the parent's decomposition, if there is a core."""
        if config.deal.core == "free":
            return super().tensor_numbers(config, modules, rank)
        inputs = rank * sum(num_in for _, num_in in modules)
        factors = inputs + rank * sum(num_out for num_out, _ in modules)
        mixing = 2 * len(modules) * rank**2 if config.deal.core == "soft" and config.deal.mixing else 0
        return TensorNumbers(
            # the adapter, its starting factors, the offset b, the guarded directions and Ω
            adapter=3 * factors + inputs + mixing,
            # gradients of A and B; for b and Ω gradients and two moments
            optimiser=factors + 3 * (factors + mixing),
            arrival=6 * factors,
        )

    def prepare(self, model: PeftModel, state: MethodState | None, context: TaskContext) -> None:
        """Ask the parent about the old tasks. With a core, decompose its adapter and write the starting factors."""
        from deal_core.adapter.stack import check_rank
        from deal_core.strategies.questions import make_rehearsal

        super().prepare(model, state, context)
        self._rows = {} if state is None else state.stored_rows
        self._rehearsal, self._answers = make_rehearsal(
            self.config.rehearsal,
            model,
            context,
            {} if state is None else state.tensors,
            self.seed,
            self.num_arrivals,
        )
        self.network: Reparametrization | None = None
        if state is None:
            return
        check_rank(self.stacks)
        if self.config.deal.core == "free":
            return
        self.network = self.reparametrization()
        self.network.synchronise()
        self.network.materialise()
        self._drift = self._rehearsal.drift(model) if self._rehearsal else None

    def reparametrization(self) -> Reparametrization:
        """Return the retention network, made from the parent's factors."""
        from deal_core.adapter.reparametrize import Reparametrization

        return Reparametrization(self.stacks, self.config.deal, self.fresh())

    def rehearsal(self) -> Rehearsal | None:
        """Return the questions about old tasks."""
        return self._rehearsal

    def parameters(self) -> Sequence[nn.Parameter]:
        """Return g, c, Ω and b; for the first task, or with a free core, return A and B."""
        return super().parameters() if self.network is None else list(self.network.parameters())

    def before_step(self) -> None:
        """Pull the gradients of A and B back to the method's parameters, and add those of the λ terms of Eq. 12.

        `penalty` is not used: one more pass over a large model's numbers would cost as much as both steps here.
        """
        if self.network is not None:
            self.network.pull_back()

    def after_step(self) -> None:
        """Materialise A and B from the stepped parameters."""
        if self.network is not None:
            self.network.materialise()

    def checkpoint(self) -> dict[str, Tensor]:
        """Return the network's parameters and the arrival's constants."""
        return {} if self.network is None else dict(self.network.state_dict())

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Restore parameters and constants, and materialise A and B from them."""
        if self.network is not None:
            self.network.load_state_dict(tensors)
            self.network.materialise()

    def finish(self) -> MethodState:
        """Keep rows if the rehearsal stores them, and the answers that later arrivals are held to."""
        from deal_core.strategies.questions import keep_rows

        kept = keep_rows(self.config.rehearsal, self.context, self._rows, self.seed)
        return MethodState(strategy=self.name, stores=self.stores, tensors={**kept, **self._answers})

    def notes(self) -> tuple[str, ...]:
        """Describe the rehearsal, the size of the adapter's core, and whether the adapter is full."""
        from deal_core.strategies.questions import not_asked

        notes = list(super().notes())
        config, network = self.config.rehearsal, self.network
        if config.asks_about_arrival and (names := not_asked(config, self.context)):
            has_rows = config.keeps_rows and self._rows
            how = "rehearsed on stored rows only, if there are any" if has_rows else "not rehearsed"
            notes.append(f"{how}, because the new task has the same prompt or rows of another format: {names}")
        if network is None or not network.num_core_slots:
            return tuple(notes)
        counts = network.num_core_slots.values()
        notes.append(f"core slots when the task arrived: {sum(counts) / len(counts):.1f} per module on average")
        if network.recycled_share > 0:
            removed = f"recycling the free slots removed {100 * network.recycled_share:.1f} % of the adapter's norm"
            if self._drift is not None:
                removed += f"; KL of the old answers to the parent's: {self._drift:.3f} per token"
            notes.append(removed)
        if network.full_modules:
            notes.append(
                f"the adapter is full in {len(network.full_modules)} of {len(counts)} modules: their core was cut to "
                "leave free slots; a larger adapter.rank in a new lineage gives more room"
            )
        return tuple(notes)
