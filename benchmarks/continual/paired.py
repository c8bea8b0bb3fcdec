"""The bootstrap of paired samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class PairedInterval:
    """Mean difference of two paired samples, with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    def in_points(self) -> dict[str, float]:
        """Return mean, low and high times 100, in this order."""
        return {name: 100 * value for name, value in vars(self).items()}


RESAMPLES_AT_ONCE = 500


def paired_interval(
    first: Sequence[float],
    second: Sequence[float],
    *,
    strata: Sequence[int] = (),
    num_resamples: int = 10_000,
    seed: int = 0,
) -> PairedInterval:
    """Bootstrap the mean of first − second, drawing pairs, and give the 2.5 and 97.5 percentiles.

    Both samples have one value per unit (a row's score, a step's time), in the same order. `strata` are the sizes of
    groups that follow each other, such as tasks: pairs are drawn within their group, and all groups have equal weight.

    Raises:
        ValueError: the samples are empty or of different length.
    """
    if len(first) != len(second) or len(first) == 0:
        raise ValueError(f"The samples have {len(first)} and {len(second)} values; give two of one length, not empty.")
    difference = numpy.asarray(first, dtype=numpy.float64) - numpy.asarray(second, dtype=numpy.float64)
    groups = numpy.split(difference, numpy.cumsum(strata or [len(difference)])[:-1])
    generator = numpy.random.default_rng(seed)
    means = numpy.mean([_resampled_means(group, num_resamples, generator) for group in groups], axis=0)
    low, high = numpy.quantile(means, [0.025, 0.975])
    mean = numpy.mean([group.mean() for group in groups])
    return PairedInterval(mean=float(mean), low=float(low), high=float(high))


def _resampled_means(
    values: NDArray[numpy.float64], num_resamples: int, generator: numpy.random.Generator
) -> list[float]:
    """The means of resamples. A resample is how often each value is drawn; hits have few values."""
    values_V, counts_V = numpy.unique(values, return_counts=True)
    means: list[float] = []
    while len(means) < num_resamples:
        size = min(RESAMPLES_AT_ONCE, num_resamples - len(means))
        drawn_RV = generator.multinomial(len(values), counts_V / len(values), size)
        means.extend(drawn_RV @ values_V / len(values))
    return means
