"""How sure a share of right answers is."""

from __future__ import annotations

from statistics import NormalDist
from typing import NamedTuple

CONFIDENCE = 0.95
"""Two-sided level of the intervals."""
_Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)


SURE_ROWS = 400
"""From this number of rows on, a score is shown without its interval: the interval is at most ±5 points."""


class CellScore(NamedTuple):
    """A score of one version on one task."""

    share: float | None
    """None: not measured."""
    num_rows: int | None
    """Its test rows; None: not known."""


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """Return the 95 % interval of Wilson (1927) of a share, 0 to 1, that was measured on n rows.

    Of graded scores the mean is given: their spread is at most that of right and wrong answers, so the interval is
    rather too wide. Without rows it is 0 to 1.
    """
    if not n:
        return 0.0, 1.0
    centre = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z * (share * (1 - share) / n + _Z**2 / (4 * n**2)) ** 0.5 / (1 + _Z**2 / n)
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))  # rounding may miss share by 1e-17


def score_text(share: float | None, n: int | None, *, names_n: bool = True) -> str:
    """Return a score in per cent with its interval and its number of rows; a dash if it was not measured.

    From SURE_ROWS rows on, and without a number of rows (None), the score stands alone. Without `names_n` the number is
    left out: it stands elsewhere.

    Example:
        >>> score_text(0.85, 20)
        '85.0, 64–95, n 20'
    """
    return "–" if share is None else ", ".join([f"{100 * share:.1f}", *_sureness(share, n)[: None if names_n else 1]])


def sureness_text(share: float | None, n: int | None) -> str:
    """Return what `score_text` adds to a score; empty if the score stands alone."""
    return "" if share is None else ", ".join(_sureness(share, n))


def _sureness(share: float, n: int | None) -> list[str]:
    if n is None or n >= SURE_ROWS:
        return []
    low, high = wilson_interval(share, n)
    return [f"{100 * low:.0f}–{100 * high:.0f}", f"n {n}"]
