"""Settings of the algorithm: frozen dataclasses, checked when they are made.

They import nothing but the standard library, so that the command line can read a spec without loading torch.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal, get_args

from deal_core.errors import ConfigError

FORBID_UNKNOWN: dict[str, Any] = {"extra": "forbid"}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Shape of the one LoRA adapter of a lineage; the same for every version of it."""

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_UNKNOWN

    rank: int = 16
    """r: number of columns of B and rows of A."""
    alpha: float | None = None
    """Scale α of ΔW = (α/r)·B·A; None means 2·rank."""
    target_modules: tuple[str, ...] | None = None
    """Names of the linear layers that carry the adapter; None means the model type's query and value projections."""

    def __post_init__(self) -> None:
        _require(self.rank >= 2, f"adapter.rank is {self.rank}; give at least 2.")
        _require(self.alpha is None or self.alpha > 0, f"adapter.alpha is {self.alpha}; give a positive number.")

    @property
    def scale_alpha(self) -> float:
        """α with its default filled in."""
        return 2.0 * self.rank if self.alpha is None else self.alpha


Quantize = Literal["none", "8bit", "4bit"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How one task is learned, whatever the strategy."""

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_UNKNOWN

    learning_rate: float = 5e-4
    """Constant rate of AdamW; no warm-up, no weight decay."""
    num_epochs: int = 1
    """Passes over the training rows."""
    max_steps: int | None = None
    """Optimiser steps; when given it replaces num_epochs."""
    batch_size: int = 8
    """Rows per micro-batch, all processes together."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per optimiser step."""
    max_grad_norm: float = 1.0
    """Clip of the global gradient norm; 0 turns it off."""
    max_prompt_tokens: int = 512
    """A longer prompt loses the end of its text, never its instruction."""
    max_answer_tokens: int = 50
    """A longer answer loses its end."""
    checkpoint_steps: int = 25
    """Optimiser steps between checkpoints; 0 keeps none."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    group_by_length: bool = True
    """Fill batches with rows of similar length."""
    seed: int = 0
    """Seed of the adapter's initialisation and of the order of rows."""
    num_processes: int = 1
    """Processes that share every micro-batch, one for each device; the result is the same to rounding."""
    quantize: Quantize = "none"
    """Precision of the frozen base model's linear layers: 8bit and 4bit (NF4) need CUDA and bitsandbytes."""

    def __post_init__(self) -> None:
        _require(self.learning_rate > 0, f"train.learning_rate is {self.learning_rate}; give a positive number.")
        counts = ("num_epochs", "batch_size", "gradient_accumulation_steps", "max_answer_tokens", "num_processes")
        for name in counts:
            _require(getattr(self, name) >= 1, f"train.{name} is {getattr(self, name)}; give at least 1.")
        _require(
            self.max_steps is None or self.max_steps >= 1, f"train.max_steps is {self.max_steps}; give at least 1."
        )
        _require(self.max_prompt_tokens >= 16, f"train.max_prompt_tokens is {self.max_prompt_tokens}; give 16 or more.")
        _require(self.checkpoint_steps >= 0, f"train.checkpoint_steps is {self.checkpoint_steps}; give 0 or more.")
        _require(self.max_grad_norm >= 0, f"train.max_grad_norm is {self.max_grad_norm}; give 0 or more.")
        _require(
            self.batch_size % self.num_processes == 0,
            f"train.batch_size is {self.batch_size}, which train.num_processes, {self.num_processes}, do not share "
            "evenly; give a multiple of it.",
        )
        _require(
            self.quantize in get_args(Quantize),
            f"train.quantize is {self.quantize!r}; give one of {', '.join(get_args(Quantize))}.",
        )

    def deciding(self) -> dict[str, Any]:
        """The settings that decide the result, for digests: not how many processes share the work.

        A base model that is not quantized goes unsaid, as before there was the choice.
        """
        values = asdict(self)
        del values["num_processes"]
        if self.quantize == "none":
            del values["quantize"]
        return values

    def num_steps(self, num_rows: int) -> int:
        """Optimiser steps on so many rows."""
        rows_per_step = self.batch_size * self.gradient_accumulation_steps
        return self.max_steps or math.ceil(num_rows / rows_per_step) * self.num_epochs


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How answers are generated and scored."""

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_UNKNOWN

    max_batch_tokens: int = 4096
    """Prompt tokens per batch, padding included."""
    max_new_tokens: int = 50
    """Longest generated answer."""
    max_old_rows: int = 5000
    """Test rows that a new version answers of all tasks before its own together; a task's share is always the same rows
    or fewer of them, so that versions are compared on the same ones."""

    def __post_init__(self) -> None:
        _require(self.max_old_rows >= 1, f"evaluate.max_old_rows is {self.max_old_rows}; give at least 1.")
        _require(self.max_batch_tokens >= 64, f"evaluate.max_batch_tokens is {self.max_batch_tokens}; give 64 or more.")
        _require(self.max_new_tokens >= 1, f"evaluate.max_new_tokens is {self.max_new_tokens}; give at least 1.")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a landed file must satisfy, and how it is split."""

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_UNKNOWN

    test_share: float = 0.2
    """Share of rows held out by hash when the file brings no split of its own."""
    max_bad_share: float = 0.2
    """An arrival with a larger share of bad rows is refused whole."""
    max_text_chars: int = 20_000
    """A row with a longer input or output is a bad row."""
    retain_training_rows: bool = False
    """Whether the store keeps an arrival's training rows once they are learned; its test rows stay either way."""
    include_texts: bool = False
    """Show texts of rows in logs, reports, notices and MLflow; without it rows appear there by number and digest alone.
    Off, since what was once copied out of the store stays where it went, whatever is deleted in the store later."""

    def __post_init__(self) -> None:
        _require(0 < self.test_share < 1, f"data.test_share is {self.test_share}; give a share between 0 and 1.")
        _require(0 <= self.max_bad_share <= 1, f"data.max_bad_share is {self.max_bad_share}; give a share from 0 to 1.")
        _require(self.max_text_chars >= 1, f"data.max_text_chars is {self.max_text_chars}; give at least 1.")


Approval = Literal["automatic", "person"]


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """What a new version must satisfy to become champion. Points are hundredths of accuracy; None asks nothing.

    Limits against the base model are held as measured. Those against the champion allow for the test's own noise, told
    from the rows on which the two versions differ (Agresti and Min, 2005). A loss counts where it is above its limit
    as measured and noise alone does not explain it; the gain of the new task, where it falls short by more than noise.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_UNKNOWN

    min_accuracy: float | None = None
    """Floor of the new task's accuracy, 0 to 1; None leaves the floor to min_gain_points alone."""
    min_gain_points: float = 10.0
    """The new task must be this many points above the untouched base model, and above always giving one answer; or half
    of what these lack to all right, where that is less."""
    min_gain_over_champion_points: float | None = 0.0
    """The new task may not fall short of the champion's accuracy plus this many points by more than noise."""
    max_drop_points: float = 10.0
    """No old task may lose more than this many points against the champion, unless noise explains the loss."""
    max_mean_drop_points: float | None = 5.0
    """Nor may the old tasks on average, where there are two or more; likewise."""
    max_perplexity_ratio: float | None = 1.5
    """Perplexity of plain English, against the untouched base model's, may grow to this multiple."""
    max_norm_ratio: float | None = 10.0
    """The adapter's norm ‖ΔW‖ may grow to this multiple of the champion's, or shrink to its inverse."""
    confidence: float = 0.95
    """One-sided level of the paired intervals, 0.5 (noise is ignored) to below 1."""
    approval: Approval = "automatic"
    """person: a version that passes waits until somebody promotes it."""

    def __post_init__(self) -> None:
        _require(
            self.min_accuracy is None or 0 <= self.min_accuracy <= 1,
            f"gate.min_accuracy is {self.min_accuracy}; give a share from 0 to 1.",
        )
        for name in ("max_drop_points", "max_mean_drop_points"):
            value = getattr(self, name)
            _require(value is None or value >= 0, f"gate.{name} is {value}; give 0 or more.")
        for name in ("max_perplexity_ratio", "max_norm_ratio"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"gate.{name} is {value}; give 1 or more.")
        _require(0.5 <= self.confidence < 1, f"gate.confidence is {self.confidence}; give 0.5 or more, below 1.")
        _require(
            self.approval in get_args(Approval),
            f"gate.approval is {self.approval!r}; give one of {', '.join(get_args(Approval))}.",
        )


Form = Literal["spectral", "literal"]
Core = Literal["frozen", "soft", "free"]
Sides = Literal["both", "A", "B"]
Kernel = Literal["heat", "linear_decay", "spline", "haar"]


@dataclass(frozen=True, kw_only=True)
class DealConfig:
    """DEAL: retention of the adapter's core spectrum and controlled updating (arXiv 2509.18942, Eq. 7-12).

    All but `core` and `interpolation` are for a soft or frozen core.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_UNKNOWN

    form: Form = "spectral"
    """spectral: slots of the (balanced) factors. literal: Eq. 8-12 on the raw factors, kept for comparison."""
    core: Core = "soft"
    """frozen: core slots never change. soft: they may, against the wall of lambda1. free: the factors are trained as
    they are, nothing is decomposed, and old answers are held by the rehearsal alone."""
    sides: Sides = "both"
    """Which factors are updated."""
    balanced: bool = True
    """Rewrite the factors as P Σ^½ and Q Σ^½ when a task arrives; False keeps them raw."""
    energy: float = 0.95
    """Core slots hold at least this share of ‖ΔW‖²_F."""
    free_share: float = 0.25
    """At least this share of the slots is left free for the new task."""
    recycle: bool = True
    """Empty the free slots and seed them anew; False lets the new task continue from what they hold, with one factor as
    long as a seed."""
    seed_scale: float = 1.0
    """Seeds of the free slots in units of PEFT's own; what is larger learns faster for the same rate."""
    project: bool = True
    """Keep free rows of A out of the core's row space; needs the balanced form."""
    kernel: Kernel = "heat"
    """The retention filter: kernels of the singular value (heat, x·e^−x, quadratic spline), or haar: a gate on the
    one-level Haar transform of the features, for comparison."""
    widths: tuple[float, ...] = (0.25, 0.5, 1.0)
    """Widths σ_j of the kernels, in units of the largest singular value."""
    num_layers: int = 1
    """K of Eq. 9; 0 turns the retention filter off."""
    mixing: bool = True
    """Train the matrix Ω of Eq. 11 beside the offset b."""
    lambda1: float = 0.01
    """Weight of the core's deviation."""
    a: float = 5.0
    """Exponent of the core's deviation."""
    lambda2: float = 0.001
    """Weight of the update's size."""
    b: float = 2.0
    """Exponent of the update's size."""
    interpolation: float = 1.0
    """γ: the version is (1 − γ)·parent + γ·trained, at the same rank; 1 keeps the trained adapter as it is."""
    tolerance: float = 0.1
    """ρ: relative deviation of a core slot at which the lambda1 term starts to bite."""

    def __post_init__(self) -> None:
        _require(0 < self.energy <= 1, f"deal.energy is {self.energy}; give a share above 0, at most 1.")
        _require(0 <= self.free_share < 1, f"deal.free_share is {self.free_share}; give a share from 0, below 1.")
        _require(bool(self.widths) and min(self.widths) > 0, f"deal.widths is {self.widths}; give positive widths.")
        _require(
            self.form == "spectral" or min(self.widths) >= 0.2,
            f"deal.widths is {self.widths}; the literal form's inverse kernel overflows below 0.2.",
        )
        _require(
            self.kernel in get_args(Kernel), f"deal.kernel is {self.kernel!r}; use {', '.join(get_args(Kernel))}."
        )
        _require(
            self.form == "spectral" or self.kernel == "heat",
            f"deal.kernel is {self.kernel!r}; the literal form has the heat kernel alone.",
        )
        _require(
            self.core in get_args(Core), f"deal.core is {self.core!r}; use {', '.join(get_args(Core))}."
        )
        changed = [each.name for each in fields(self) if getattr(self, each.name) != each.default]
        idle = [f"deal.{name}" for name in changed if name not in ("core", "interpolation")]
        _require(
            self.core != "free" or not idle,
            f"deal.core is free, which decomposes nothing, so that {', '.join(idle)} would do nothing; leave it "
            "out, or set deal.core to soft or frozen.",
        )
        _require(
            self.balanced or not self.recycle or self.form == "literal" or self.core == "free",
            "deal.balanced is false and deal.recycle is true: a slot of the raw factors holds a mixture of directions, "
            "so that emptying one would lose what was learned; set deal.recycle to false too.",
        )
        _require(self.num_layers >= 0, f"deal.num_layers is {self.num_layers}; give 0 or more.")
        _require(
            min(self.lambda1, self.lambda2) >= 0,
            f"deal.lambda1 is {self.lambda1} and deal.lambda2 is {self.lambda2}; give 0 or more.",
        )
        _require(self.a >= self.b >= 1, f"deal.a is {self.a} and deal.b is {self.b}; the method needs a >= b >= 1.")
        _require(
            0 < self.interpolation <= 1, f"deal.interpolation is {self.interpolation}; give a share above 0, at most 1."
        )
        _require(self.seed_scale > 0, f"deal.seed_scale is {self.seed_scale}; give a positive number.")
        _require(self.tolerance > 0, f"deal.tolerance is {self.tolerance}; give a positive number.")


Texts = Literal["none", "arrival", "stored", "both"]


@dataclass(frozen=True, kw_only=True)
class RehearsalConfig:
    """Old tasks are asked again while a new one is learned; `deal` and `replay` read it."""

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_UNKNOWN

    texts: Texts = "arrival"
    """What the old tasks are asked about. arrival: texts of the new task, under the old tasks' instructions; nothing is
    kept of old data. stored: rows of the old tasks, kept with the adapter. both: half and half."""
    stored_share: float = 0.02
    """Share of a task's training rows that `stored` and `both` keep."""
    num_texts: int = 256
    """Questions made when the texts are the arrival's, shared out among the old tasks; fewer if the steps put fewer."""
    rows_per_step: int = 4
    """Questions in every optimiser step, beside the batch."""
    weight: float = 1.0
    """Weight of their loss against the new task's."""
    temperature: float = 1.0
    """Softness of the answers that are held: of the parent's distribution and of the model's."""

    def __post_init__(self) -> None:
        _require(self.texts in get_args(Texts), f"rehearsal.texts is {self.texts!r}; use {', '.join(get_args(Texts))}.")
        _require(
            0 < self.stored_share <= 1,
            f"rehearsal.stored_share is {self.stored_share}; give a share above 0, at most 1.",
        )
        for name in ("num_texts", "rows_per_step"):
            _require(getattr(self, name) >= 1, f"rehearsal.{name} is {getattr(self, name)}; give at least 1.")
        _require(self.weight > 0, f"rehearsal.weight is {self.weight}; give a positive number.")
        _require(self.temperature > 0, f"rehearsal.temperature is {self.temperature}; give a positive number.")

    @property
    def keeps_rows(self) -> bool:
        """Whether rows of old tasks are stored."""
        return self.texts in ("stored", "both")

    @property
    def asks_about_arrival(self) -> bool:
        """Whether the new task's texts are asked about."""
        return self.texts in ("arrival", "both")


@dataclass(frozen=True, kw_only=True)
class RivalConfig:
    """One knob each of the methods that `deal` is measured against."""

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_UNKNOWN

    o_lora_weight: float = 0.01
    """λ of O-LoRA's orthogonality (arXiv 2310.14152)."""
    ella_weight: float = 10_000.0
    """λ of ELLA's overlap with the past (arXiv 2601.02232)."""
    ewc_weight: float = 100.0
    """λ of EWC's quadratic penalty (arXiv 1612.00796)."""
    lwf_weight: float = 1.0
    """Weight of LwF's distillation (arXiv 1606.09282)."""
    lwf_temperature: float = 2.0
    """T of LwF's distillation."""

    def __post_init__(self) -> None:
        for name in ("o_lora_weight", "ella_weight", "ewc_weight", "lwf_weight"):
            _require(getattr(self, name) >= 0, f"rivals.{name} is {getattr(self, name)}; give 0 or more.")
        _require(
            self.lwf_temperature > 0, f"rivals.lwf_temperature is {self.lwf_temperature}; give a positive number."
        )


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Settings of all strategies; each reads its own part."""

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_UNKNOWN

    deal: DealConfig = DealConfig()
    rehearsal: RehearsalConfig = RehearsalConfig()
    rivals: RivalConfig = RivalConfig()
