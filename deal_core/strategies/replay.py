"""Replay: a few rows of every old task are kept and ride along with the new ones."""

from __future__ import annotations

from dataclasses import replace

from peft import PeftModel

from deal_core.strategies.questions import keep_rows, make_rehearsal
from deal_core.strategies.rehearsal import Rehearsal
from deal_core.strategies.strategy import MethodState, Stores, Strategy, TaskContext


class Replay(Strategy):
    """SeqLoRA with stored rows, whatever `rehearsal.texts` says: it is the method that keeps data."""

    name = "replay"
    reads = ("rehearsal.stored_share", "rehearsal.rows_per_step", "rehearsal.weight")
    revision = 2  # stored rows are put in another order with every arrival

    @property
    def stores(self) -> Stores:
        """Rows of old tasks."""
        return "data"

    def prepare(self, model: PeftModel, state: MethodState | None, context: TaskContext) -> None:
        """Take the stored rows."""
        super().prepare(model, state, context)
        self._stored = replace(self.config.rehearsal, texts="stored")
        self._rows = {} if state is None else state.stored_rows
        self._rehearsal = make_rehearsal(self._stored, model, context, self._rows, self.seed)

    def rehearsal(self) -> Rehearsal | None:
        """Return questions from stored rows, held to their labels."""
        return self._rehearsal

    def finish(self) -> MethodState:
        """Add a sample of this task's rows to what is kept."""
        kept = keep_rows(self._stored, self.context, self._rows, self.seed)
        return MethodState(strategy=self.name, stores=self.stores, tensors=kept)
