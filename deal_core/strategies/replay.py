"""Replay: plain LoRA with kept rows of old tasks in every step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deal_core.adapter.files import MethodState, Stores
from deal_core.method_config import MethodConfig
from deal_core.strategies.strategy import PlannedArrival, Strategy, TaskContext

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

    from deal_core.strategies.rehearsal import Rehearsal


class Replay(Strategy):
    """SeqLoRA that keeps rows of every task it learns, and rehearses them while it learns another one."""

    name = "replay"
    reads = ("rehearsal",)
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
        """Take the parent's kept rows, and make the rehearsal."""
        super().prepare(model, state, context)
        self._kept: dict[str, Tensor] = {} if state is None else state.kept_rows
        self._rehearsal = self.make_rehearsal()

    def make_rehearsal(self) -> Rehearsal | None:
        """Return the kept rows with their right answers as targets; None if there are none."""
        from deal_core.strategies.kept_rows import right_rows
        from deal_core.strategies.rehearsal import Rehearsal

        sets = [rows for old in self.context.old_tasks if (rows := right_rows(self._kept, old))]
        if not sets:
            return None
        num_rows = self.config.rehearsal.per_step
        return Rehearsal(sets, self.context.collator(), num_rows=num_rows, seed=self.arrival_seed)

    def rehearsal(self) -> Rehearsal | None:
        """Return the rows of old tasks."""
        return self._rehearsal

    def finish(self) -> MethodState:
        """Keep rows of the new task beside those of the old ones."""
        from deal_core.strategies.kept_rows import keep_rows

        kept = keep_rows(self.config.rehearsal, self.context, self._kept, self.seed)
        return MethodState(strategy=self.name, stores=self.stores, tensors=kept)
