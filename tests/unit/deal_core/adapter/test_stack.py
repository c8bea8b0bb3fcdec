"""The balanced form, and the split into slots."""

from __future__ import annotations

import pytest
import torch

from deal_core.adapter.stack import count_core_slots, decompose


@pytest.fixture
def factors() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 4, 20, generator=generator), torch.randn(3, 12, 4, generator=generator)


def test_the_balanced_form_is_the_same_function_and_shares_the_singular_values_equally(factors):
    a_MRI, b_MOR = factors
    spectrum = decompose(a_MRI, b_MOR)
    y_A, y_B = spectrum.factors()
    torch.testing.assert_close(y_B @ y_A.mT, b_MOR @ a_MRI, rtol=1e-5, atol=1e-5)
    expected = torch.linalg.svdvals(b_MOR @ a_MRI)[:, :4]
    torch.testing.assert_close(spectrum.sigma_MR, expected, rtol=1e-4, atol=1e-5)
    for y_MNR in (y_A, y_B):
        torch.testing.assert_close(y_MNR.mT @ y_MNR, torch.diag_embed(spectrum.sigma_MR), rtol=1e-4, atol=1e-4)


def test_no_full_product_is_formed():
    """Shapes of an 8B model's projection: the full product would take 64 GiB for these modules."""
    spectrum = decompose(torch.randn(1, 2, 131_072), torch.randn(1, 131_072, 2))
    assert spectrum.left_MOR.shape == spectrum.right_MIR.shape == (1, 131_072, 2)


@pytest.mark.parametrize(
    ("sigma", "energy", "count"),
    [
        ([3.0, 1.0, 0.1, 0.0], 0.95, 2),
        ([3.0, 1.0, 0.1, 0.0], 0.85, 1),
        ([1.0, 1.0, 1.0, 1.0], 0.95, 4),
        ([1.0, 1.0, 1.0, 1.0], 1.0, 4),
        ([0.0, 0.0, 0.0, 0.0], 0.95, 0),
    ],
)
def test_core_holds_the_energy(sigma, energy, count):
    assert count_core_slots(torch.tensor([sigma]), energy).tolist() == [count]
