"""Compare two versions on the same test rows: the drop, and how certain it is."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist


@dataclass(frozen=True)
class PairedDrop:
    """Numbers of rows that a version lost and gained against the version before, of `num_rows` common rows."""

    num_rows: int
    num_lost: int
    num_gained: int

    @classmethod
    def of(cls, before: str, after: str) -> PairedDrop:
        """Compare outcomes with one character per row: 1 for a right answer, else 0.

        Raises:
            ValueError: the numbers of rows differ.

        Example:
            >>> PairedDrop.of("1100", "1010")
            PairedDrop(num_rows=4, num_lost=1, num_gained=1)
        """
        pairs = list(zip(before, after, strict=True))
        return cls(len(pairs), pairs.count(("1", "0")), pairs.count(("0", "1")))

    @property
    def points(self) -> float:
        """The drop of accuracy in percentage points; a negative value is a gain."""
        return 100 * (self.num_lost - self.num_gained) / self.num_rows if self.num_rows else 0.0

    @property
    def standard_error(self) -> float:
        """Standard error of `points`. Half a row is added to each cell of the 2×2 table, so few rows stay uncertain.

        Agresti and Min (2005), "Simple improved confidence intervals for comparing matched proportions".
        """
        return 100 * self._deviation()

    def lower_bound(self, confidence: float) -> float:
        """One-sided lower confidence bound of the drop in points, with the same 2×2 table."""
        centre = (self.num_lost - self.num_gained) / (self.num_rows + 2)
        return 100 * (centre - NormalDist().inv_cdf(confidence) * self._deviation())

    def _deviation(self) -> float:
        num_rows, lost, gained = self.num_rows + 2, self.num_lost + 0.5, self.num_gained + 0.5
        return float((lost + gained - (lost - gained) ** 2 / num_rows) ** 0.5 / num_rows)


def smallest_clear_drop(num_rows: int, confidence: float) -> float | None:
    """The smallest drop in points that `num_rows` test rows can distinguish from noise; None: they cannot.

    Example:
        >>> smallest_clear_drop(100, 0.95)
        4.0
    """
    for num_lost in range(1, num_rows + 1):
        drop = PairedDrop(num_rows, num_lost, 0)
        if drop.lower_bound(confidence) > 0:
            return drop.points
    return None
