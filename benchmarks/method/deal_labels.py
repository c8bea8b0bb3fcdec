"""`deal` that learns the right labels of kept rows alone, without the parent's answers."""

from __future__ import annotations

from deal_core.strategies.deal import Deal
from deal_core.strategies.old_tasks import make_rehearsal
from deal_core.strategies.rehearsal import Rehearsal
from deal_core.strategies.strategy import SEED_STRIDE


class DealLabels(Deal):
    """DEAL with β 1."""

    name = "deal_labels"

    def make_rehearsal(self) -> Rehearsal | None:
        """Return the rows of old tasks with their right answers as targets."""
        seed = self.seed + SEED_STRIDE * self.num_arrivals
        return make_rehearsal(self.config.rehearsal, self.model, self.context, self._kept, seed, answer_weight=1.0)
