"""Replay: plain LoRA with stored rows of old tasks in every step."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from deal_core.method_config import MethodConfig
from deal_core.strategies.strategy import MethodState, PlannedArrival, Stores, Strategy, TaskContext

if TYPE_CHECKING:
    from peft import PeftModel

    from deal_core.strategies.rehearsal import Rehearsal


class Replay(Strategy):
    """SeqLoRA with stored rows of old tasks. `rehearsal.texts` is ignored: this method always keeps data."""

    name = "replay"
    reads = tuple(
        f"rehearsal.{name}" for name in ("stored_share", "max_stored_rows", "balance_stored", "rows_per_step", "weight")
    )
    memories = ("rows",)
    revision = 2  # stored rows are put in another order with every arrival

    @property
    def stores(self) -> Stores:
        """Always "data": rows of old tasks."""
        return "data"

    @classmethod
    def questions_per_step(cls, config: MethodConfig, arrival: PlannedArrival) -> int:
        """Return how many stored rows a step has."""
        return config.rehearsal.rows_per_step if arrival.old_tasks else 0

    def prepare(self, model: PeftModel, state: MethodState | None, context: TaskContext) -> None:
        """Make questions of the parent's stored rows."""
        from deal_core.strategies.questions import make_rehearsal

        super().prepare(model, state, context)
        self._stored = replace(self.config.rehearsal, texts="stored")
        self._rows = {} if state is None else state.stored_rows
        self._rehearsal, _ = make_rehearsal(self._stored, model, context, self._rows, self.seed)

    def rehearsal(self) -> Rehearsal | None:
        """Return questions from stored rows, with their labels as targets."""
        return self._rehearsal

    def finish(self) -> MethodState:
        """Add a sample of this task's rows to the stored rows."""
        from deal_core.strategies.questions import keep_rows

        kept = keep_rows(self._stored, self.context, self._rows, self.seed)
        return MethodState(strategy=self.name, stores=self.stores, tensors=kept)
