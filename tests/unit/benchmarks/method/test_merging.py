"""A merge of adapters is the weighted sum of their ΔW, as far as the rank allows."""

from __future__ import annotations

import pytest
import torch

from benchmarks.method.merging import weighted


def factors(seed: int, rank: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of two modules."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, rank, 12, generator=generator), torch.randn(2, 10, rank, generator=generator)


def delta(pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return pair[1] @ pair[0]


def test_what_fits_the_rank_is_summed_exactly_in_any_order():
    pairs = [
        tuple(
            torch.cat([part, torch.zeros_like(part)], dim) for part, dim in zip(factors(seed, 2), (1, 2), strict=True)
        )
        for seed in (1, 2)
    ]
    wanted = 0.5 * delta(pairs[0]) + 0.5 * delta(pairs[1])
    for order in (pairs, pairs[::-1]):
        merged, cut_off = weighted(order, [0.5, 0.5])
        torch.testing.assert_close(delta(merged), wanted, rtol=1e-4, atol=1e-5)
        assert cut_off == pytest.approx(0, abs=1e-6)


def test_the_part_that_the_rank_cuts_off_is_said():
    pairs = [factors(1), factors(2)]
    merged, cut_off = weighted(pairs, [1.0, -1.0])
    wanted = delta(pairs[0]) - delta(pairs[1])
    lost = float((delta(merged) - wanted).square().sum() / wanted.square().sum())
    assert cut_off == pytest.approx(lost, rel=1e-3) and cut_off > 0.01
