"""Between the parent's adapter and the trained one, at the same rank.

Fine-tuned weights and those they started from lie in one basin: points between them trade what was learned against what
was kept better than either end (Wortsman et al., arXiv 2109.01903, for full weights).
"""

from __future__ import annotations

import torch
from torch import Tensor

from deal_core.adapter.spectrum import decompose

Factors = tuple[Tensor, Tensor]


def interpolate(parent: Factors, trained: Factors, share: float) -> Factors:
    """Return factors of the best rank-R approximation of (1 − share)·ΔW_parent + share·ΔW_trained.

    Args:
        parent: A (M×R×I) and B (M×O×R) of the parent version.
        trained: A and B after training.
        share: γ, from 0 (the parent) to 1 (the trained adapter).
    """
    (parent_A, parent_B), (trained_A, trained_B) = parent, trained
    rank = trained_A.shape[1]
    a_MRI = torch.cat([parent_A, trained_A], dim=1)
    b_MOR = torch.cat([(1 - share) * parent_B, share * trained_B], dim=2)
    y_A, y_B = decompose(a_MRI, b_MOR).truncate(rank).factors()
    return y_A.mT, y_B
