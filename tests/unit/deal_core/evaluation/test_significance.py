"""Paired drops: counted on the same rows, with an interval that few rows make wide."""

from __future__ import annotations

import random
from statistics import NormalDist

import pytest

from deal_core.evaluation.significance import PairedDrop, smallest_clear_drop


def test_rows_of_right_and_wrong_answers_make_the_drop() -> None:
    drop = PairedDrop.of([1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 1, 0, 0, 0])
    assert drop == PairedDrop.of_hits(8, 2, 1)
    assert drop.points == pytest.approx(12.5)


def test_the_interval_of_hits_is_that_of_agresti_and_min() -> None:
    """Their formula by the 2x2 table, with half a row in each cell."""
    num_rows, lost, gained = 60, 9, 4
    n, b, c = num_rows + 2, lost + 0.5, gained + 0.5
    deviation = ((b + c) - (b - c) ** 2 / n) ** 0.5 / n
    expected = 100 * ((b - c) / n - NormalDist().inv_cdf(0.9) * deviation)
    assert PairedDrop.of_hits(num_rows, lost, gained).lower_bound(0.9) == pytest.approx(expected)


def test_graded_scores_give_the_drop_of_their_mean_and_less_noise_than_hits() -> None:
    before, after = [0.5, 0.75, 1.0, 0.0] * 10, [0.5, 0.65, 0.9, 0.1] * 10
    drop = PairedDrop.of(before, after)
    assert drop.points == pytest.approx(2.5)
    assert 0 < drop.noise(0.95) < PairedDrop.of_hits(40, 20, 10).noise(0.95) / 5


def test_outcomes_of_different_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shorter|longer"):
        PairedDrop.of([1, 1], [1, 1, 1])


def test_the_interval_narrows_with_rows_and_widens_with_confidence() -> None:
    bounds = [PairedDrop.of_hits(n, n // 10, 0).lower_bound(0.95) for n in (20, 40, 200, 2000)]
    assert bounds == sorted(bounds) and bounds[0] < 0 < bounds[-1] < 10
    assert PairedDrop.of_hits(40, 6, 0).lower_bound(0.99) < PairedDrop.of_hits(40, 6, 0).lower_bound(0.9)


def test_the_same_net_drop_is_less_sure_where_rows_were_gained_as_well() -> None:
    assert PairedDrop.of_hits(100, 30, 20).lower_bound(0.95) < 0 < PairedDrop.of_hits(100, 10, 0).lower_bound(0.95)


@pytest.mark.nightly
@pytest.mark.parametrize("num_rows", [30, 100])
def test_the_bound_is_above_the_truth_about_as_seldom_as_it_says(num_rows: int) -> None:
    chance, above = random.Random(0), 0
    for _ in range(4000):
        lost = sum(chance.random() < 0.15 for _ in range(num_rows))
        gained = sum(chance.random() < 0.05 / 0.85 for _ in range(num_rows - lost))
        above += PairedDrop.of_hits(num_rows, lost, gained).lower_bound(0.95) > 10
    assert above / 4000 < 0.07


def test_the_smallest_clear_drop_is_clear_and_the_next_smaller_is_not() -> None:
    for num_rows in (3, 36, 500):
        points = smallest_clear_drop(num_rows, 0.95)
        assert points is not None
        lost = round(points * num_rows / 100)
        clear, smaller = (PairedDrop.of_hits(num_rows, count, 0).lower_bound(0.95) for count in (lost, lost - 1))
        assert clear > 0 >= smaller
    assert smallest_clear_drop(2, 0.95) is None
