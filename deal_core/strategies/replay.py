"""Replay: plain LoRA with kept rows of old tasks in every step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deal_core.adapter.files import MethodState, Stores
from deal_core.method_config import MethodConfig
from deal_core.strategies.strategy import SEED_STRIDE, PlannedArrival, Strategy, TaskContext

if TYPE_CHECKING:
    from peft import PeftModel

    from deal_core.strategies.rehearsal import Rehearsal


class Replay(Strategy):
    """SeqLoRA with kept rows of old tasks; their right answers are the targets."""

    name = "replay"
    reads = ("rehearsal",)
    weight = 1.0
    """Weight of the kept rows' loss relative to the new task's."""
    revision = 3  # the rows of `deal` are kept: fifty a task, every label in its share

    @property
    def stores(self) -> Stores:
        """Return "data" if rows are kept; else "nothing"."""
        return "data" if self.config.rehearsal.rows else "nothing"

    @classmethod
    def rehearsed_per_step(cls, config: MethodConfig, arrival: PlannedArrival) -> int:
        """Return how many kept rows a step has."""
        return config.rehearsal.per_step if arrival.kept else 0

    def prepare(self, model: PeftModel, state: MethodState | None, context: TaskContext) -> None:
        """Take the parent's kept rows."""
        from deal_core.strategies.kept_rows import rows_name, unpack
        from deal_core.strategies.rehearsal import Rehearsal

        super().prepare(model, state, context)
        self._kept = {} if state is None else state.kept_rows
        names = [rows_name(old.name) for old in context.old_tasks]
        sets = [unpack(self._kept[name]) for name in names if name in self._kept]
        self._rehearsal: Rehearsal | None = None
        if any(sets):
            self._rehearsal = Rehearsal(
                sets,
                context.collator(),
                num_rows=self.config.rehearsal.per_step,
                weight=self.weight,
                seed=self.seed + SEED_STRIDE * self.num_arrivals,
            )

    def rehearsal(self) -> Rehearsal | None:
        """Return the kept rows."""
        return self._rehearsal

    def finish(self) -> MethodState:
        """Keep rows of the new task beside those of the old ones."""
        from deal_core.strategies.kept_rows import keep_rows

        kept = keep_rows(self.config.rehearsal, self.context, self._kept, self.seed)
        return MethodState(strategy=self.name, stores=self.stores, tensors=kept)
