"""The mathematics of DEAL on small factors: what holds at the start, what training may move, where gradients go."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from deal_core.adapter import factor
from deal_core.adapter.factor import TINY, SpectralFactor
from deal_core.adapter.reparametrize import Reparametrization
from deal_core.adapter.stack import LoraStack, decompose
from deal_core.method_config import DealConfig
from tests.deal_configs import deal_with

RANK, IN, OUT, MODULES = 8, 24, 20, 3
SIGMA = torch.tensor([2.0, 1.0, 0.5, 0.1, 0.05, 0.02, 0.01, 0.005])
SETTINGS = {
    "soft": DealConfig(),
    "frozen": DealConfig(core="frozen"),
    "two layers": deal_with(num_layers=2),
    "offset alone": deal_with(num_layers=0, mixing=False),
}


def make_stack() -> LoraStack:
    """Modules whose ΔW has the spectrum SIGMA: three core directions hold 99 % of the energy."""
    generator = torch.Generator().manual_seed(1)
    a_params, b_params = [], []
    for _ in range(MODULES):
        q = torch.linalg.qr(torch.randn(IN, RANK, generator=generator))[0]
        p = torch.linalg.qr(torch.randn(OUT, RANK, generator=generator))[0]
        twist = torch.randn(RANK, RANK, generator=generator)
        a_params.append(nn.Parameter(torch.linalg.inv(twist) @ (q * SIGMA.sqrt()).mT))
        b_params.append(nn.Parameter((p * SIGMA.sqrt()) @ twist))
    return LoraStack(tuple(f"m{i}" for i in range(MODULES)), tuple(a_params), tuple(b_params))


def network_of(config: DealConfig, stack: LoraStack | None = None) -> tuple[Reparametrization, LoraStack]:
    stack = stack or make_stack()
    return Reparametrization([stack], config, torch.Generator().manual_seed(2)), stack


def output_of(side: nn.Module) -> Tensor:
    """O of a factor's network, for autograd: X̂ + X̂Ω + b, free slots projected out of the guarded directions."""
    if not isinstance(side, SpectralFactor):
        return side()
    out_MNR, update = side.start_MNR, side.update
    if side.retention is not None:
        out_MNR = torch.where(side.core_M1R, out_MNR * side.retention.gains().unsqueeze(1), out_MNR)
    offset_MNR = update.offset_MNR if update.trainable_M1R is None else update.offset_MNR * update.trainable_M1R
    mixed_MNR = 0.0 if update.mixing_MRR is None else out_MNR @ update.mixing_MRR
    out_MNR = out_MNR + offset_MNR + mixed_MNR
    if side.guarded_MNR is not None:
        projected_MNR = out_MNR - side.guarded_MNR @ (side.guarded_MNR.mT @ out_MNR)
        out_MNR = torch.where(side.core_M1R, out_MNR, projected_MNR)
    return out_MNR


def penalty_of(network: Reparametrization) -> Tensor:
    """The λ terms of all sides, for autograd."""
    sides = [side for pair in network.sides for side in pair]
    return torch.stack([spectral_penalty(x) if isinstance(x, SpectralFactor) else x.penalty() for x in sides]).sum()


def spectral_penalty(side: SpectralFactor) -> Tensor:
    """λ₁·mean_k(‖y'_k − y_k‖/(ρ‖y_k‖))^a over core slots, λ₂·mean|·|^b over Ω and the free columns of b."""
    config, is_core_MR = side._config, side.core_M1R.squeeze(1)
    core_MR = is_core_MR.float()
    deviation_MR = (output_of(side) - side.start_MNR).square().sum(1)
    scale_MR = config.tolerance**2 * side.start_MNR.square().sum(1) + TINY
    ratio_MR = torch.where(is_core_MR, deviation_MR / scale_MR, 0.0)  # a free column may start at zero
    wall_MR = (ratio_MR + TINY) ** (config.a / 2) * core_MR
    wall = (wall_MR.sum(1) / core_MR.sum(1).clamp(min=1)).sum()
    size = (side.update.offset_MNR * ~side.core_M1R).abs().pow(config.b).mean((1, 2)).sum()
    if side.update.mixing_MRR is not None:
        size = size + side.update.mixing_MRR.abs().pow(config.b).mean((1, 2)).sum()
    return config.lambda1 * wall + config.lambda2 * size


def factors(network: Reparametrization) -> tuple[Tensor, Tensor]:
    a_side, b_side = network.sides[0]
    return output_of(a_side), output_of(b_side)


def set_gradients(stack: LoraStack, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in (*stack.a_params, *stack.b_params):
        param.grad = torch.randn(param.shape, generator=generator)


def step(network: Reparametrization, stack: LoraStack, num_steps: int, lr: float = 1e-2) -> None:
    """AdamW on random gradients of the factors."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0)
    network.materialise()
    for i in range(num_steps):
        set_gradients(stack, 10 + i)
        network.pull_back()
        optimizer.step()
        network.materialise()


def test_free_share_cuts_the_core_and_says_so():
    network, _ = network_of(DealConfig(energy=1.0, free_share=0.5))
    assert set(network.num_core_slots.values()) == {4}
    assert network.full_modules == ("m0", "m1", "m2")
    assert 0 < network.kept_energy < 1
    network, _ = network_of(DealConfig(energy=0.95, free_share=0.5))
    assert network.full_modules == () and network.kept_energy >= 0.95


@pytest.mark.parametrize("name", SETTINGS)
def test_nothing_of_the_core_is_lost_before_the_first_step(name):
    network, stack = network_of(SETTINGS[name])
    a_MRI, b_MOR = stack.read()
    before = b_MOR @ a_MRI
    y_A, y_B = factors(network)
    lost = (y_B @ y_A.mT - before).norm() / before.norm()
    # what recycling may lose is the energy outside the core: √(1 − energy) of the norm at most
    assert 1e-3 < lost < 0.05**0.5


def test_every_slot_can_learn_after_recycling():
    """A slot near zero in both factors gets no gradient and cannot learn."""
    network, _ = network_of(DealConfig())
    y_A, y_B = factors(network)
    assert y_B.norm(dim=1)[:, 2:].max() == 0
    assert y_A.norm(dim=1)[:, 2:].min() > 0.1


def test_recycled_slots_hold_no_direction_of_the_core_after_training():
    network, stack = network_of(DealConfig())
    core = decompose(*stack.read()).right_MIR[..., :2]
    step(network, stack, 50)
    free = factors(network)[0][..., 2:]
    assert (core.mT @ free).norm() <= 1e-5 * free.norm()
    network, stack = network_of(DealConfig())
    network.sides[0][0].guarded_MNR = None
    step(network, stack, 50)
    free = factors(network)[0][..., 2:]
    assert (core.mT @ free).norm() > 1e-2 * free.norm()


def test_a_frozen_core_never_moves_and_a_soft_one_does():
    for core, moves in (("frozen", False), ("soft", True)):
        network, stack = network_of(DealConfig(core=core))
        before = [y.detach().clone() for y in factors(network)]
        step(network, stack, 5)
        for old, new in zip(before, factors(network), strict=True):
            assert torch.equal(old[..., :2], new[..., :2]) is not moves
            assert not torch.equal(old[..., 2:], new[..., 2:])


@pytest.mark.parametrize("block_bytes", [1, factor.BLOCK_BYTES])
@pytest.mark.parametrize("name", SETTINGS)
def test_one_pass_sets_the_gradients_of_loss_and_penalty(name, block_bytes, monkeypatch):
    """For single modules and for all modules together."""
    monkeypatch.setattr(factor, "BLOCK_BYTES", block_bytes)
    config = replace(SETTINGS[name], lambda1=0.3, lambda2=0.7)
    monkeypatch.setattr(type(config), "tolerance", 0.5)
    check_one_pass(*network_of(config))


def check_one_pass(network: Reparametrization, stack: LoraStack) -> None:
    """Compared with autograd through `output_of` and `penalty_of`."""
    step(network, stack, 3)
    set_gradients(stack, 5)
    outputs = list(factors(network))
    gradients = [torch.stack(given) for given in stack.target_gradients()]
    loss = sum((out * given).sum() for out, given in zip(outputs, gradients, strict=True))
    expected = torch.autograd.grad(loss + penalty_of(network), list(network.parameters()))
    network.pull_back()
    for wanted, parameter in zip(expected, network.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-5)
    network.materialise()
    for out, targets in zip(outputs, stack.targets(), strict=True):
        torch.testing.assert_close(torch.stack(targets), out, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("a", [8, 20])
def test_a_steep_wall_has_finite_gradients(a, monkeypatch):
    """The paper's grid goes up to 20. Free columns of B start at zero, so their relative deviation has no bound."""
    whole = lambda side: iter([(slice(0, len(side.start_MNR)), side.start_MNR.shape[2])])  # noqa: E731 as on a GPU
    monkeypatch.setattr(factor.SpectralFactor, "_blocks", whole)
    network, stack = network_of(deal_with(a=a, b=2))
    step(network, stack, 3)
    for parameter in network.parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all()


def test_state_restores_constants_and_parameters_bit_for_bit():
    network, stack = network_of(DealConfig())
    step(network, stack, 3)
    expected = [y.detach().clone() for y in factors(network)]
    other = Reparametrization([make_stack()], DealConfig(), torch.Generator().manual_seed(99))
    assert not torch.equal(factors(other)[0], expected[0])
    other.load_state_dict(network.state_dict())
    for restored, wanted in zip(factors(other), expected, strict=True):
        assert torch.equal(restored, wanted)


def perturbed(network: Reparametrization) -> Reparametrization:
    """Change every parameter of a network."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


def test_output_follows_its_equations():
    """h, X̂ and O of one module, written out, for perturbed g, c, Ω and b."""
    network, stack = network_of(deal_with(num_layers=2))
    side = perturbed(network).sides[0][1]
    network.materialise()
    s = SIGMA / SIGMA[0]
    gain = torch.ones(RANK)
    for k in range(2):
        terms = []
        for j, width in enumerate((0.25, 0.5, 1.0)):
            moved = torch.exp(-((s - side.retention.centres_KMJ[k, 0, j]) ** 2) / (2 * width**2))
            terms.append(side.retention.filters_KMJ[k, 0, j] * moved / torch.exp(-((s - 1) ** 2) / (2 * width**2)))
        gain = gain * torch.stack(terms).sum(0)
    retained = side.start_MNR[0] * torch.where(torch.arange(RANK) < 2, gain, 1.0)
    expected = retained + retained @ side.update.mixing_MRR[0] + side.update.offset_MNR[0]
    torch.testing.assert_close(stack.targets()[1][0], expected, rtol=1e-4, atol=1e-5)


def test_seeds_are_those_of_a_new_lora():
    network, _ = network_of(deal_with(seed_scale=2.0))
    seeds = network.sides[0][0].start_MNR[..., 2:]
    bound = 2 * IN**-0.5
    assert 0.9 * bound < seeds.max() <= bound and -bound <= seeds.min() < -0.9 * bound


def test_one_slot_stays_free_whatever_the_share():
    network, _ = network_of(DealConfig(energy=1.0, free_share=0.0))
    assert set(network.num_core_slots.values()) == {RANK - 1}
