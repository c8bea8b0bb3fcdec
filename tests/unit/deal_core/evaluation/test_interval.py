"""The interval beside a score."""

from __future__ import annotations

import pytest
from scipy import stats

from deal_core.evaluation.interval import score_text, wilson_interval


@pytest.mark.parametrize(("num_right", "n"), [(0, 1), (17, 20), (20, 20), (0, 30), (288, 400)])
def test_it_is_wilsons(num_right: int, n: int) -> None:
    wilson = stats.binomtest(num_right, n).proportion_ci(0.95, method="wilson")
    assert wilson_interval(num_right / n, n) == pytest.approx((wilson.low, wilson.high), abs=1e-9)


def test_without_rows_nothing_is_known() -> None:
    assert wilson_interval(0.0, 0) == (0.0, 1.0)


def test_a_score_of_few_rows_says_how_sure_it_is() -> None:
    assert score_text(0.85, 20) == "85.0, 64–95, n 20" and score_text(0.5, 399) == "50.0, 45–55, n 399"
    assert [score_text(0.85, 400), score_text(0.85, None), score_text(None, 20)] == ["85.0", "85.0", "–"]
