"""DEAL as its paper writes it (arXiv 2509.18942, Eq. 8-12), on the raw factors, and other kernels on the balanced ones.

Shapes: M modules of one shape, N features of the side (I for A, O for B), R rank, J kernel widths, K layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from deal_core.adapter.factor import START_CENTRE, ControlledUpdate, LogKernel, SpectralRetention, log_heat
from deal_core.adapter.reparametrize import Reparametrization
from deal_core.adapter.stack import LoraStack
from deal_core.limits import require, settings
from deal_core.method_config import DealConfig, MethodConfig
from deal_core.strategies.deal import Deal
from deal_core.strategies.strategy import TensorNumbers

FLOOR = 1e-3
"""Added to the spline so that its logarithm exists everywhere; beyond the spline's support the gain is 1."""
SMALL = 1e-6


@settings("strategy_options")
class LiteralOptions:
    """Options of `deal_literal`. Its other settings are those of `deal`."""

    form: Literal["literal", "spectral"] = "literal"
    """literal: Eq. 8-12 on the raw factors. spectral: as `deal`, for another kernel."""
    kernel: Literal["heat", "linear_decay", "spline"] = "heat"
    """The retention filter's function of the singular value: heat, x·e^−x, or a quadratic spline."""

    def __post_init__(self) -> None:
        require(
            self.form == "spectral" or self.kernel == "heat",
            f"strategy_options.kernel is {self.kernel!r}; the literal form has only the heat kernel.",
        )


def log_linear_decay(spectrum: Tensor, centre: Tensor | float, width: Tensor) -> Tensor:
    """φ(s) = x·exp(−x) with x = s/(σc): rises like s and decays beyond s = σc."""
    x = spectrum.clamp_min(SMALL) / (width * torch.as_tensor(centre).clamp_min(SMALL))
    return x.log() - x


def log_spline(spectrum: Tensor, centre: Tensor | float, width: Tensor) -> Tensor:
    """Quadratic B-spline of u = (s − c)/σ: ¾ − u² for |u| < ½, ½(3/2 − |u|)² up to |u| = 3/2, 0 beyond."""
    u = ((spectrum - centre) / width).abs()
    outer = 0.5 * (1.5 - u).clamp_min(0) ** 2
    return (torch.where(u < 0.5, 0.75 - u**2, outer) + FLOOR).log()


LOG_KERNELS: dict[str, LogKernel] = {"heat": log_heat, "linear_decay": log_linear_decay, "spline": log_spline}


class LiteralRetention(nn.Module):
    """Eq. 8-10 as written, on a raw factor: H ← Σ_j Ψ_j diag(g_j) Ψ_j⁻¹ H with Ψ_j = U diag(φ_j(s)) Uᵀ.

    U and s come from the SVD of the factor; g_j is diagonal over its N rows; c_j is learnable.
    """

    widths_J: Tensor
    basis_MNR: Tensor
    normalised_MR: Tensor

    def __init__(self, y_MNR: Tensor, widths: Sequence[float], num_layers: int) -> None:
        super().__init__()
        num_modules, num_rows, _ = y_MNR.shape
        basis_MNR, sigma_MR, _ = torch.linalg.svd(y_MNR, full_matrices=False)
        shape = (num_layers, num_modules, len(widths))
        self.register_buffer("widths_J", y_MNR.new_tensor(list(widths)))
        self.register_buffer("basis_MNR", basis_MNR)
        self.register_buffer("normalised_MR", sigma_MR / sigma_MR[:, :1].clamp(min=1e-30))
        self.filters_KMJN = nn.Parameter(y_MNR.new_full((*shape, num_rows), 1 / len(widths)))
        self.centres_KMJ = nn.Parameter(y_MNR.new_full(shape, START_CENTRE))

    def forward(self, y_MNR: Tensor) -> Tensor:
        """Apply the K layers to Y (M×N×R); the identity on Y's column space before the first step."""
        hidden_MNR = y_MNR
        basis_M1NR = self.basis_MNR.unsqueeze(1)
        for filter_MJN, centre_MJ in zip(self.filters_KMJN, self.centres_KMJ, strict=True):
            log_MJR = log_heat(self.normalised_MR.unsqueeze(1), centre_MJ.unsqueeze(-1), self.widths_J.view(1, -1, 1))
            coefficients_M1RR = basis_M1NR.mT @ hidden_MNR.unsqueeze(1)
            inverse_MJNR = basis_M1NR @ (torch.exp(-log_MJR).unsqueeze(-1) * coefficients_M1RR)
            filtered_MJNR = filter_MJN.unsqueeze(-1) * inverse_MJNR
            outer_MJNR = basis_M1NR @ (torch.exp(log_MJR).unsqueeze(-1) * (basis_M1NR.mT @ filtered_MJNR))
            hidden_MNR = outer_MJNR.sum(1)
        return hidden_MNR


class LiteralFactor(nn.Module):
    """Eq. 8-12 as written, on the raw factor, with gradients by autograd.

    The penalty is on θ₁'s deviation from its start: one on g erases Y.
    """

    start_MNR: Tensor

    def __init__(self, start_MNR: Tensor, config: DealConfig) -> None:
        super().__init__()
        self._config = config
        self.register_buffer("start_MNR", start_MNR)
        self.retention: LiteralRetention | None = None
        if config.num_layers > 0:
            self.retention = LiteralRetention(start_MNR, config.widths, config.num_layers)
        self.update = ControlledUpdate(start_MNR, mixing=config.mixing)

    def forward(self) -> Tensor:
        """Return O: X̂ + X̂Ω + b."""
        retained_MNR = self.start_MNR if self.retention is None else self.retention(self.start_MNR)
        out_MNR, mixing_MRR = retained_MNR + self.update.offset_MNR, self.update.mixing_MRR
        return out_MNR if mixing_MRR is None else out_MNR + retained_MNR @ mixing_MRR

    def penalty(self) -> Tensor:
        """λ₁‖θ₁ − θ₁⁰‖_a^a + λ₂‖θ₂‖_b^b with θ₁ = {g, C} and θ₂ = {Ω, b}."""
        total = self.start_MNR.new_zeros(())
        config = self._config
        if self.retention is not None:
            starts = ((self.retention.filters_KMJN, 1 / len(config.widths)), (self.retention.centres_KMJ, 1.0))
            for theta, start in starts:
                total = total + config.lambda1 * (theta - start).abs().pow(config.a).sum()
        for theta in self.update.parameters():
            total = total + config.lambda2 * theta.abs().pow(config.b).sum()
        return total

    @torch.no_grad()
    def write(self, targets: Sequence[Tensor]) -> None:
        """Write O of every module into its target (N×R)."""
        for target, value in zip(targets, self(), strict=True):
            target.copy_(value)

    def pull_back(self, gradients: Sequence[Tensor]) -> None:
        """Set the parameters' gradients, given those of the loss with respect to O; the penalty's are added."""
        for parameter in self.parameters():
            parameter.grad = None
        torch.autograd.backward([self()], [torch.stack(list(gradients)).float()])
        torch.autograd.backward(self.penalty())


class LiteralReparametrization(Reparametrization):
    """The networks of the raw factors. There is no core, so no slot is recycled."""

    def networks_of(
        self, stack: LoraStack, config: DealConfig, generator: torch.Generator
    ) -> tuple[LiteralFactor, LiteralFactor]:
        """Return the networks of a stack's A and B."""
        del generator  # nothing is seeded
        a_MRI, b_MOR = stack.read()
        return LiteralFactor(a_MRI.mT, config), LiteralFactor(b_MOR, config)


class DealLiteral(Deal):
    """`deal` with the paper's form of the retention network, or with another kernel."""

    name = "deal_literal"
    Options = LiteralOptions

    @classmethod
    def tensor_numbers(cls, config: MethodConfig, modules: Sequence[tuple[int, int]], rank: int) -> TensorNumbers:
        """Count as `deal`, without guarded directions in the literal form."""
        numbers = super().tensor_numbers(config, modules, rank)
        if cls.options_of(config).form == "spectral" or config.deal.core == "free":
            return numbers
        return replace(numbers, adapter=numbers.adapter - rank * sum(num_in for _, num_in in modules))

    def reparametrization(self) -> Reparametrization:
        """Return the network of this form, with this kernel."""
        if self.options.form == "literal":
            return LiteralReparametrization(self.stacks, self.config.deal, self.fresh())
        network = super().reparametrization()
        set_kernel(network, self.options.kernel)
        return network


def set_kernel(network: Reparametrization, kernel: str) -> None:
    """Give every retention filter another kernel. Before the first step all gains are 1 with each of them."""
    for module in network.modules():
        if isinstance(module, SpectralRetention):
            module.log_kernel = LOG_KERNELS[kernel]
