"""Heat kernels on the normalised spectrum (arXiv 2509.18942, Eq. 8)."""

from __future__ import annotations

from torch import Tensor


def log_heat(spectrum: Tensor, centre: Tensor | float, width: Tensor) -> Tensor:
    """Logarithm of the heat kernel φ(s) = exp(−(s − c)²/(2σ²)).

    The inverse kernel is taken by the sign of the exponent, so callers subtract logarithms instead of dividing.
    Arguments broadcast against each other.
    """
    return -((spectrum - centre) ** 2) / (2 * width**2)
