"""The interval of a share."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from deal_core.evaluation.interval import wilson_interval


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_it_is_wilsons(hits: tuple[int, int]) -> None:
    num_right, n = hits
    expected = stats.binomtest(num_right, n).proportion_ci(0.95, method="wilson")
    assert wilson_interval(num_right / n, n) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_without_rows_nothing_is_known() -> None:
    assert wilson_interval(0.0, 0) == (0.0, 1.0)
