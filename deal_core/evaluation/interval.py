"""How sure a share of right answers is."""

from __future__ import annotations

from statistics import NormalDist

CONFIDENCE = 0.95
"""Two-sided level of the intervals."""
_Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """Return the 95 % interval of Wilson (1927) of a share, 0 to 1, that was measured on n rows.

    Of graded scores the mean is given: their spread is at most that of right and wrong answers, so the interval is
    rather too wide. Without rows it is 0 to 1.
    """
    if not n:
        return 0.0, 1.0
    centre = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z * (share * (1 - share) / n + _Z**2 / (4 * n**2)) ** 0.5 / (1 + _Z**2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)
