"""The balanced form of LoRA adapters, and the split of its directions into core and free slots.

Shapes: M modules of one shape, O out features, I in features, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spectrum:
    """Thin singular value decomposition ΔW = P Σ Qᵀ of M adapters, singular values in descending order."""

    left_MOR: Tensor
    """P, orthonormal columns."""
    sigma_MR: Tensor
    right_MIR: Tensor
    """Q, orthonormal columns."""

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return the balanced factors Y_A = Q Σ^½ (M×I×R) and Y_B = P Σ^½ (M×O×R), with ΔW = Y_B Y_Aᵀ."""
        root_M1R = self.sigma_MR.sqrt().unsqueeze(1)
        return self.right_MIR * root_M1R, self.left_MOR * root_M1R

    def truncate(self, rank: int) -> Spectrum:
        """Keep the `rank` largest directions: the best approximation of this rank (Eckart-Young)."""
        return Spectrum(self.left_MOR[..., :rank], self.sigma_MR[:, :rank], self.right_MIR[..., :rank])


def decompose(a_MRI: Tensor, b_MOR: Tensor) -> Spectrum:
    """Decompose ΔW = B·A without forming ΔW: QR of each factor, then SVD of the small matrix between them.

    The result has min(R, I, O) directions per module.
    """
    q_A, r_A = torch.linalg.qr(a_MRI.float().mT)
    q_B, r_B = torch.linalg.qr(b_MOR.float())
    u, sigma, vh = torch.linalg.svd(r_B @ r_A.mT, full_matrices=False)
    return Spectrum(q_B @ u, sigma, q_A @ vh.mT)


def count_core_slots(sigma_MR: Tensor, energy: float, num_free: int) -> Tensor:
    """Number of leading directions that hold at least `energy` of ‖ΔW‖²_F; at least `num_free` are left free.

    The result is an integer tensor of shape (M,). A module whose ΔW is zero has no core.
    """
    power_MR = sigma_MR.double().square()
    total_M1 = power_MR.sum(1, keepdim=True)
    below_MR = power_MR.cumsum(1) < energy * total_M1 * (1 - 1e-12)
    count_M = torch.where(total_M1.squeeze(1) > 0, below_MR.sum(1) + 1, 0)
    return count_M.clamp(max=sigma_MR.shape[1] - num_free)
