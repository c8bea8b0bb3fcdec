"""`deal` that learns the right labels of kept rows alone, without the parent's answers."""

from __future__ import annotations

from deal_core.strategies.deal import Deal
from deal_core.strategies.old_tasks import make_rehearsal
from deal_core.strategies.rehearsal import Rehearsal


class DealLabels(Deal):
    """DEAL with β 1."""

    name = "deal_labels"

    def make_rehearsal(self) -> Rehearsal | None:
        """Return the rows of old tasks with their right answers as targets."""
        config, seed = self.config.rehearsal, self.arrival_seed
        return make_rehearsal(config, self.model, self.context, self._kept, seed, answer_weight=1.0)
