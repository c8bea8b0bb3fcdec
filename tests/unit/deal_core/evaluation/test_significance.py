"""Paired drops: counted on the same rows, with an interval that few rows make wide."""

from __future__ import annotations

import random

import pytest

from deal_core.evaluation.significance import PairedDrop, smallest_clear_drop


def test_lost_and_gained_rows_are_counted_apart() -> None:
    drop = PairedDrop.of("11110000", "11001000")
    assert (drop.num_rows, drop.num_lost, drop.num_gained) == (8, 2, 1)
    assert drop.points == pytest.approx(12.5)


def test_outcomes_of_different_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shorter|longer"):
        PairedDrop.of("11", "111")


def test_the_interval_narrows_with_rows_and_widens_with_confidence() -> None:
    bounds = [PairedDrop(n, n // 10, 0).lower_bound(0.95) for n in (20, 40, 200, 2000)]
    assert bounds == sorted(bounds) and bounds[0] < 0 < bounds[-1] < 10
    assert PairedDrop(40, 6, 0).lower_bound(0.99) < PairedDrop(40, 6, 0).lower_bound(0.9)


def test_the_same_net_drop_is_less_sure_where_rows_were_gained_as_well() -> None:
    assert PairedDrop(100, 30, 20).lower_bound(0.95) < 0 < PairedDrop(100, 10, 0).lower_bound(0.95)


def test_no_difference_gives_no_certainty_of_a_drop() -> None:
    assert PairedDrop(5, 0, 0).lower_bound(0.95) < 0


@pytest.mark.parametrize("num_rows", [30, 100])
def test_the_bound_is_above_the_truth_about_as_seldom_as_it_says(num_rows: int) -> None:
    chance, above = random.Random(0), 0
    for _ in range(4000):
        lost = sum(chance.random() < 0.15 for _ in range(num_rows))
        gained = sum(chance.random() < 0.05 / 0.85 for _ in range(num_rows - lost))
        above += PairedDrop(num_rows, lost, gained).lower_bound(0.95) > 10
    assert above / 4000 < 0.07


def test_the_smallest_clear_drop_is_clear_and_the_next_smaller_is_not() -> None:
    for num_rows in (3, 36, 500):
        points = smallest_clear_drop(num_rows, 0.95)
        assert points is not None
        lost = round(points * num_rows / 100)
        clear, smaller = (PairedDrop(num_rows, count, 0).lower_bound(0.95) for count in (lost, lost - 1))
        assert clear > 0 >= smaller
    assert smallest_clear_drop(2, 0.95) is None
