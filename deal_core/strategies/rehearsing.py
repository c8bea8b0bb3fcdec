"""What the strategies have in common that keep rows of the tasks which they learn."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deal_core.adapter.files import MethodState, Stores
from deal_core.strategies.strategy import Strategy, TaskContext

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

    from deal_core.strategies.rehearsal import Rehearsal


class KeepsRows(Strategy):
    """A strategy that keeps rows of every task it learns, and rehearses them while it learns another one."""

    @property
    def stores(self) -> Stores:
        """Return "data" if rows are kept; else "nothing"."""
        return "data" if self.config.rehearsal.rows else "nothing"

    def prepare(self, model: PeftModel, state: MethodState | None, context: TaskContext) -> None:
        """Take the parent's kept rows, and make the rehearsal."""
        super().prepare(model, state, context)
        self._kept: dict[str, Tensor] = {} if state is None else state.kept_rows
        self._rehearsal = self.make_rehearsal()

    def make_rehearsal(self) -> Rehearsal | None:
        """Return the rows of old tasks with what is learned from them; the model is still the parent."""
        raise NotImplementedError

    def rehearsal(self) -> Rehearsal | None:
        """Return the rows of old tasks."""
        return self._rehearsal

    def finish(self) -> MethodState:
        """Keep rows of the new task beside those of the old ones."""
        from deal_core.strategies.kept_rows import keep_rows

        kept = keep_rows(self.config.rehearsal, self.context, self._kept, self.seed)
        return MethodState(strategy=self.name, stores=self.stores, tensors=kept)
