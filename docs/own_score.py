"""A score in a package of its own: texts with many different words come first.

The package's pyproject.toml names it; then `selection: {score: variety, keep: 0.3}` works in a spec:

    [project.entry-points."deal_pipeline.scores"]
    variety = "own_score:Variety"
"""

from __future__ import annotations

import torch
from torch import Tensor

from deal_core.selection.score import Candidates, RowScore


class Variety(RowScore):
    """The number of different words of a row's input. A score that needs the model sets `reads_model = True`."""

    name = "variety"

    def score(self, candidates: Candidates) -> Tensor:
        """Return one number per row."""
        return torch.tensor([len(set(text.lower().split())) for text in candidates.rows["input"]], dtype=torch.float64)
