"""Replay: plain LoRA with kept rows of old tasks in every step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deal_core.method_config import MethodConfig
from deal_core.strategies.rehearsing import KeepsRows
from deal_core.strategies.strategy import SEED_STRIDE, PlannedArrival

if TYPE_CHECKING:
    from deal_core.strategies.rehearsal import Rehearsal


class Replay(KeepsRows):
    """SeqLoRA with kept rows of old tasks; their right answers are the targets."""

    name = "replay"
    reads = ("rehearsal",)
    weight = 1.0
    """Weight of the kept rows' loss relative to the new task's."""
    revision = 3  # the rows of `deal` are kept: fifty a task, every label in its share

    @classmethod
    def rehearsed_per_step(cls, config: MethodConfig, arrival: PlannedArrival) -> int:
        """Return how many kept rows a step has."""
        return config.rehearsal.per_step if arrival.kept else 0

    def make_rehearsal(self) -> Rehearsal | None:
        """Return the kept rows; None if there are none."""
        from deal_core.strategies.kept_rows import right_rows
        from deal_core.strategies.rehearsal import Rehearsal

        sets = [rows for old in self.context.old_tasks if (rows := right_rows(self._kept, old))]
        if not sets:
            return None
        return Rehearsal(
            sets,
            self.context.collator(),
            num_rows=self.config.rehearsal.per_step,
            weight=self.weight,
            seed=self.seed + SEED_STRIDE * self.num_arrivals,
        )
