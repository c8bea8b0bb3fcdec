"""DEAL: retain the adapter's core spectrum, learn the new task in the free slots (arXiv 2509.18942)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from deal_core.adapter.files import MethodState
from deal_core.method_config import MethodConfig
from deal_core.strategies.replay import Replay
from deal_core.strategies.strategy import PlannedArrival, TaskContext, TensorNumbers

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor, nn

    from deal_core.adapter.reparametrize import Reparametrization
    from deal_core.strategies.rehearsal import Rehearsal


ANSWER_WEIGHT = 0.5
"""β: weight of the right answer in the target of a kept row; the rest is the parent's answer."""


class Deal(Replay):
    """The first task of a lineage is plain LoRA.

    A later task is replay whose targets hold the parent's answers too; see `deal_core.strategies.old_tasks`. With a
    soft or frozen core, the parameters of the retention network are trained instead of A and B.
    """

    name = "deal"
    reads = ("deal", "rehearsal")
    first_is_plain = True
    revision = 3  # rows of old tasks are kept and rehearsed with labels and the parent's answers

    @classmethod
    def rehearsed_per_step(cls, config: MethodConfig, arrival: PlannedArrival) -> int:
        """Return how many rows of old tasks a step has."""
        return config.rehearsal.per_step if cls.num_answered(config, arrival) else 0

    @classmethod
    def num_answered(cls, config: MethodConfig, arrival: PlannedArrival) -> int:
        """Return how many rows of old tasks the parent answers before the first step."""
        from deal_core.strategies.old_tasks import num_answered

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
        """Make the rehearsal with the parent's answers. With a core, decompose its adapter and write the factors."""
        from deal_core.adapter.stack import check_rank

        super().prepare(model, state, context)
        self.network: Reparametrization | None = None
        if state is None:
            return
        check_rank(self.stacks)
        if self.config.deal.core == "free":
            return
        self.network = self.reparametrization()
        self.network.synchronise()
        self.network.materialise()

    def make_rehearsal(self) -> Rehearsal | None:
        """Return the rows of old tasks with their targets, which the model as it is now answers."""
        from deal_core.strategies.old_tasks import make_rehearsal

        config, seed = self.config.rehearsal, self.arrival_seed
        return make_rehearsal(config, self.model, self.context, self._kept, seed, answer_weight=ANSWER_WEIGHT)

    def reparametrization(self) -> Reparametrization:
        """Return the retention network, made from the parent's factors."""
        from deal_core.adapter.reparametrize import Reparametrization

        return Reparametrization(self.stacks, self.config.deal, self.fresh())

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

    def notes(self) -> tuple[str, ...]:
        """Describe the rehearsal, and say what it costs if the adapter is full."""
        from deal_core.strategies.old_tasks import not_rehearsed

        notes, network = list(super().notes()), self.network
        if names := not_rehearsed(self.context, self._kept):
            notes.append(
                f"not rehearsed, because no rows are kept and the new task has the same prompt or rows of another "
                f"format: {names}"
            )
        energy = self.config.deal.energy
        if network is not None and network.full_modules and network.kept_energy < energy:
            notes.append(
                f"the adapter is full in {len(network.full_modules)} of {len(network.num_core_slots)} modules: to "
                f"leave free slots, {100 * (1 - network.kept_energy):.1f} % of what it had learned was dropped (of "
                f"‖ΔW‖²_F; deal.energy allows {100 * (1 - energy):.1f} %); a larger adapter.rank in a new lineage "
                "gives more room"
            )
        return tuple(notes)
