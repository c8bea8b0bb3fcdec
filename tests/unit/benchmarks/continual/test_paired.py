"""The bootstrap of paired samples."""

from __future__ import annotations

import numpy
import pytest

from benchmarks.continual.paired import paired_interval


def test_paired_interval_covers_the_mean_as_theory_says() -> None:
    generator = numpy.random.default_rng(3)
    shared = generator.normal(size=400) * 10  # the pairs' common part must cancel
    interval = paired_interval(shared + generator.normal(0.5, 1.0, 400), shared, num_resamples=2000)
    half_width = 1.96 / 400**0.5
    assert interval.low < interval.mean < interval.high
    assert interval.high - interval.low == pytest.approx(2 * half_width, rel=0.15)
    assert interval.mean == pytest.approx(0.5, abs=0.15)


def test_paired_interval_is_reproducible_and_follows_its_seed() -> None:
    first, second = numpy.random.default_rng(5).normal(size=(2, 40)).tolist()
    one = paired_interval(first, second, num_resamples=50)
    assert one == paired_interval(first, second, num_resamples=50)
    other = paired_interval(first, second, num_resamples=50, seed=1)
    assert other.mean == one.mean and (other.low, other.high) != (one.low, one.high)


@pytest.mark.parametrize(("first", "second"), [([], []), ([1.0], [1.0, 2.0])])
def test_paired_interval_wants_pairs(first: list[float], second: list[float]) -> None:
    with pytest.raises(ValueError, match="two of one length"):
        paired_interval(first, second)
