"""The paper's form of DEAL: its equations, its kernels, and plain LoRA as the limit in which everything is off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.method.deal_literal import FLOOR, LOG_KERNELS, LiteralReparametrization, set_kernel
from deal_core.adapter.reparametrize import Reparametrization
from deal_core.adapter.stack import LoraStack
from deal_core.method_config import DealConfig
from tests.deal_configs import deal_with
from tests.unit.deal_core.adapter.test_reparametrize import (
    check_one_pass,
    make_stack,
    network_of,
    penalty_of,
    perturbed,
)
from tests.unit.deal_core.conftest import at_night
from tests.unit.deal_core.strategies.test_strategies import STEPS
from tests.unit.deal_core.test_golden_losses import STEPS as GOLDEN_STEPS
from tests.unit.deal_core.test_golden_losses import check_losses

OPTIONS: dict[str, dict[str, Any]] = {
    "literal": {},
    "linear decay": {"form": "spectral", "kernel": "linear_decay"},
    "spline": {"form": "spectral", "kernel": "spline"},
}


def literal_network(config: DealConfig) -> tuple[Reparametrization, LoraStack]:
    stack = make_stack()
    return LiteralReparametrization([stack], config, torch.Generator()), stack


def network(name: str, **changes: Any) -> tuple[Reparametrization, LoraStack]:
    """The network of one of OPTIONS."""
    if name == "literal":
        return literal_network(deal_with(**changes))
    made, stack = network_of(deal_with(**{"widths": (0.5, 1.0), **changes}))
    set_kernel(made, OPTIONS[name]["kernel"])
    return made, stack


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_are_those_of_autograd(name: str) -> None:
    check_one_pass(*network(name, lambda1=0.3, lambda2=0.7, tolerance=0.5))


def test_literal_form_follows_its_equation():
    """Compared with a full Ψ_j, for one layer and perturbed g and c."""
    network, _ = literal_network(deal_with(num_layers=1))
    side = network.sides[0][1]
    retention = side.retention
    with torch.no_grad():
        retention.filters_KMJN.add_(0.1 * torch.rand_like(retention.filters_KMJN))
        retention.centres_KMJ.add_(0.1 * torch.rand_like(retention.centres_KMJ))
    y_NR = side.start_MNR[0]
    u, s, _ = torch.linalg.svd(y_NR, full_matrices=False)
    s = s / s[0]
    expected = torch.zeros_like(y_NR)
    for j, width in enumerate((0.25, 0.5, 1.0)):
        phi = torch.exp(-((s - retention.centres_KMJ[0, 0, j]) ** 2) / (2 * width**2))
        psi, inverse = u @ torch.diag(phi) @ u.mT, u @ torch.diag(1 / phi) @ u.mT
        expected = expected + psi @ torch.diag(retention.filters_KMJN[0, 0, j]) @ inverse @ y_NR
    torch.testing.assert_close(side()[0], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("kernel", "values"),
    [
        # s, c, σ → φ: at the centre, half a width away, beyond the end
        ("linear_decay", [(1, 1, 1, 0.3678794), (0.5, 1, 1, 0.3032653), (1, 2, 0.5, 0.3678794)]),
        ("spline", [(1, 1, 1, 0.75), (0.25, 1, 1, 0.28125), (0.75, 1, 1, 0.6875), (0, 1, 0.5, 0.0)]),
    ],
)
def test_kernels_follow_their_formulas(kernel, values):
    for s, c, width, expected in values:
        log = LOG_KERNELS[kernel](torch.tensor(float(s)), torch.tensor(float(c)), torch.tensor(float(width)))
        assert float(log.exp()) - (FLOOR if kernel == "spline" else 0) == pytest.approx(expected, abs=1e-5)


def test_literal_penalty_follows_its_equation():
    config = deal_with(lambda1=0.3, lambda2=0.7, a=3.0, b=2.5)
    assert penalty_of(literal_network(config)[0]) == 0
    network = perturbed(literal_network(config)[0])
    expected = 0.0
    for side in network.sides[0]:
        expected += 0.3 * ((side.retention.filters_KMJN - 1 / 3).abs() ** 3).sum()
        expected += 0.3 * ((side.retention.centres_KMJ - 1).abs() ** 3).sum()
        expected += 0.7 * sum((theta.abs() ** 2.5).sum() for theta in (side.update.offset_MNR, side.update.mixing_MRR))
    torch.testing.assert_close(penalty_of(network), expected, rtol=1e-4, atol=1e-4)


def test_later_task_with_everything_off_is_plain_lora(parent, train):
    """Over 20 fp32 steps, with balancing, filter, recycling, projection and λ turned off."""
    off = deal_with(num_layers=0, mixing=False, lambda1=0, lambda2=0)
    ours, plain = (weights(train(s, parent, deal=off, train=STEPS).folder) for s in ("deal_literal", "seq_lora"))
    for name in plain:
        torch.testing.assert_close(ours[name], plain[name], rtol=0, atol=1e-4)
    started = weights(parent)
    assert max((plain[name] - started[name]).abs().max() for name in plain) > 1e-2


def test_losses_of_a_second_task(parent, train):
    check_losses("deal_literal", "deal_literal", train("deal_literal", parent, train=GOLDEN_STEPS).losses)


@pytest.mark.parametrize("options", [{}, OPTIONS["spline"], *at_night(OPTIONS["linear decay"])], ids=str)
def test_every_option_changes_the_result(options, parent, train, tmp_path):
    default, changed = (
        weights(train(name, parent, strategy_options=given).folder)
        for name, given in (("deal", {}), ("deal_literal", options))
    )
    assert any(not torch.allclose(default[name], changed[name], rtol=1e-5, atol=1e-7) for name in default)
