"""The interval beside a score."""

from __future__ import annotations

import pytest
from scipy import stats

from deal_core.evaluation.interval import wilson_interval


@pytest.mark.parametrize(("num_right", "n"), [(0, 1), (17, 20), (20, 20), (0, 30), (288, 400)])
def test_it_is_wilsons(num_right: int, n: int) -> None:
    wilson = stats.binomtest(num_right, n).proportion_ci(0.95, method="wilson")
    assert wilson_interval(num_right / n, n) == pytest.approx((wilson.low, wilson.high), abs=1e-9)


def test_without_rows_nothing_is_known() -> None:
    assert wilson_interval(0.0, 0) == (0.0, 1.0)
