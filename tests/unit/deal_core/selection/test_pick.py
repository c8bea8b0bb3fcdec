"""Rows are picked by their scores, under a fixed budget and with the labels in their shares."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deal_core.method_config import SelectionConfig
from deal_core.selection.pick import pick_rows, quotas, ranked


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.data())
def test_quotas_add_up_and_every_label_is_within_one_of_its_share(sizes, data):
    named = {f"label {place}": size for place, size in enumerate(sizes)}
    budget = data.draw(st.integers(1, sum(sizes)))
    found = quotas(named, budget)
    assert sum(found.values()) == budget
    assert all(0 <= found[name] <= size for name, size in named.items())
    if budget >= len(named):
        assert min(found.values()) >= 1
    if min(budget * size / sum(sizes) for size in sizes) >= 1:
        assert all(abs(found[name] - budget * size / sum(sizes)) <= 1 for name, size in named.items())


def test_a_rare_label_is_not_crowded_out():
    labels = ["often"] * 90 + ["rare"] * 10
    scores = torch.arange(100, 0, -1).double()  # the rare label has the lowest scores
    by_label = pick_rows(scores, labels, 10, SelectionConfig(keep=10), seed=0)
    assert sum(row >= 90 for row in by_label) == 1
    assert pick_rows(scores, None, 10, SelectionConfig(keep=10), seed=0) == list(range(10))


def test_high_and_low_take_an_end_and_ties_go_to_the_first_row():
    scores = torch.tensor([2.0, 1.0, 2.0, 3.0, 1.0])
    assert pick_rows(scores, None, 2, SelectionConfig(keep=2), seed=0) == [0, 3]
    assert pick_rows(scores, None, 2, SelectionConfig(keep=2, pick="low"), seed=0) == [1, 4]


def test_a_band_takes_its_rows_at_random_and_then_the_nearest():
    config = SelectionConfig(keep=10, pick="band", band=(0.4, 0.6))
    scores = torch.randperm(100, generator=torch.Generator().manual_seed(3)).double()
    chosen = [pick_rows(scores, None, 10, config, seed) for seed in range(20)]
    assert all(40 <= scores[row] < 60 for rows in chosen for row in rows)
    assert len({tuple(rows) for rows in chosen}) == 20
    wide = pick_rows(scores, None, 40, config, seed=0)
    assert {int(scores[row]) for row in wide} == set(range(30, 70))


def test_weighted_draws_follow_the_softmax_of_the_scores():
    config = SelectionConfig(keep=2, pick="weighted", temperature=0.5)
    scores = torch.tensor([0.0, 0.5, 1.0])
    generator = torch.Generator().manual_seed(0)
    firsts = torch.tensor([ranked(scores, config, generator)[0] for _ in range(4000)])
    shares = torch.bincount(firsts, minlength=3) / 4000
    torch.testing.assert_close(shares, (scores / 0.5).softmax(0), atol=0.03, rtol=0)


@pytest.mark.parametrize("pick", ["high", "band", "weighted"])
def test_the_seed_alone_decides_a_random_choice(pick):
    config, scores = SelectionConfig(keep=30, pick=pick), torch.rand(100, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(1)
    first = pick_rows(scores, None, 30, config, seed=5)
    torch.manual_seed(2)
    assert pick_rows(scores, None, 30, config, seed=5) == first and len(set(first)) == 30
