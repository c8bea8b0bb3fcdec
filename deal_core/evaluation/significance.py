"""Compare two versions on the same test rows: the drop, and how certain it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from statistics import NormalDist

SAME = 1e-9
"""Scores of a row that differ by less are equal."""


@dataclass(frozen=True)
class PairedDrop:
    """The differences before − after of `num_rows` rows' scores, each from 0 to 1."""

    num_rows: int
    """n, rows that both versions answered."""
    total: float
    """Σd, sum of the differences."""
    squares: float
    """Σd²."""
    num_changed: int
    """m, rows whose score changed."""

    @classmethod
    def of(cls, before: Sequence[float], after: Sequence[float]) -> PairedDrop:
        """Compare the scores of two versions, row by row.

        Raises:
            ValueError: the numbers of rows differ.
        """
        differences = [float(first) - float(second) for first, second in zip(before, after, strict=True)]
        changed = [difference for difference in differences if abs(difference) > SAME]
        return cls(len(differences), float(sum(changed)), float(sum(change**2 for change in changed)), len(changed))

    @classmethod
    def of_hits(cls, num_rows: int, num_lost: int, num_gained: int) -> PairedDrop:
        """The drop if `num_lost` right answers became wrong and `num_gained` wrong answers became right."""
        num_changed = num_lost + num_gained
        return cls(num_rows, float(num_lost - num_gained), float(num_changed), num_changed)

    @property
    def points(self) -> float:
        """The drop of the mean score in points (0.01); a negative value is a gain."""
        return 100 * self.total / self.num_rows if self.num_rows else 0.0

    @property
    def are_hits(self) -> bool:
        """Whether every score that changed went from 1 to 0 or from 0 to 1."""
        return self.squares == self.num_changed

    def noise(self, confidence: float) -> float:
        """How far the drop may be from the true drop by chance, in points: q·SE at a one-sided confidence.

        For right and wrong answers this is the interval of Agresti and Min (2005), "Simple improved confidence
        intervals for comparing matched proportions": half a row is added to each cell of the 2×2 table, so few rows
        stay uncertain, and q is the normal quantile.

        Graded scores have no such table, so the same is written with differences. Two rows are added, together with
        the mean square s² = Σd²/m of the changed rows: SE² = (Σd² + s² − (Σd)²/(n + 2)) / (n + 2)². For right and
        wrong answers s² is 1, and SE is theirs. q is Student's quantile with n − 1 degrees of freedom.
        `python -m benchmarks.gate_noise coverage` measures how often the interval holds the true drop.
        """
        return 100 * self._quantile(confidence) * self._deviation()

    @property
    def standard_error(self) -> float:
        """SE of `noise`, in points."""
        return 100 * self._deviation()

    def lower_bound(self, confidence: float) -> float:
        """One-sided lower confidence bound of the drop in points, with the same two rows added."""
        return 100 * self.total / (self.num_rows + 2) - self.noise(confidence)

    def _quantile(self, confidence: float) -> float:
        if self.are_hits:
            return NormalDist().inv_cdf(confidence)
        from scipy.special import stdtrit  # `deal check` needs the normal quantile alone, and scipy loads slowly

        return float(stdtrit(max(1, self.num_rows - 1), confidence))

    def _deviation(self) -> float:
        num_rows = self.num_rows + 2
        mean_square = self.squares / self.num_changed if self.num_changed else 1.0
        return float((self.squares + mean_square - self.total**2 / num_rows) ** 0.5 / num_rows)


def what_hits_tell(num_rows: int, limit: float, confidence: float) -> str | None:
    """What right and wrong answers to `num_rows` rows can distinguish from noise, in words.

    None: they can distinguish a drop of `limit` points, so they are enough.
    """
    clear = smallest_clear_drop(num_rows, confidence)
    if clear is None:
        return "no drop"
    return f"a drop only from {clear:.1f} points on" if clear > limit else None


def rows_to_see(points: float, confidence: float) -> int:
    """The test rows with which four of five drops of so many points are told from noise: n = (q + q₈₀)²·s/d².

    s = 1/3 is the share of the rows that change their answer, q the one-sided quantile of the gate's confidence.
    """
    quantiles = NormalDist().inv_cdf(confidence) + NormalDist().inv_cdf(0.8)
    return ceil(quantiles**2 / 3 / (points / 100) ** 2)


def smallest_clear_drop(num_rows: int, confidence: float) -> float | None:
    """The smallest drop in points that `num_rows` right answers can distinguish from noise; None: they cannot."""
    for num_lost in range(1, num_rows + 1):
        drop = PairedDrop.of_hits(num_rows, num_lost, 0)
        if drop.lower_bound(confidence) > 0:
            return drop.points
    return None
