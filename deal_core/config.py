"""Settings of the algorithm: frozen dataclasses, checked when they are made.

Each field declares its limits, so that a spec, Python and the parameter form of a server keep the same ones. They
import no torch, so that the command line can read a spec without it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, fields
from typing import Annotated, Any, Literal

from pydantic import Field

from deal_core.errors import ConfigError
from deal_core.limits import (
    AtLeastOne,
    AtLeastZero,
    Count,
    CountOrZero,
    Flag,
    Number,
    Positive,
    Seed,
    Share,
    ShareAboveZero,
    ShareBelowOne,
    settings,
)

FORBID_UNKNOWN: dict[str, Any] = {"extra": "forbid"}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@settings("adapter")
class AdapterConfig:
    """Shape of the one LoRA adapter of a lineage; the same for every version of it."""

    rank: Annotated[Count, Field(ge=2)] = 16
    """r: number of columns of B and rows of A."""
    alpha: Positive | None = None
    """Scale α of ΔW = (α/r)·B·A; None means 2·rank."""
    target_modules: tuple[str, ...] | None = None
    """Names of the linear layers that carry the adapter; None means the model type's query and value projections."""

    @property
    def scale_alpha(self) -> float:
        """α with its default filled in."""
        return 2.0 * self.rank if self.alpha is None else self.alpha


Quantize = Literal["none", "8bit", "4bit"]


@settings("train")
class TrainConfig:
    """How one task is learned, whatever the strategy."""

    learning_rate: Positive = 5e-4
    """Constant rate of AdamW; no warm-up, no weight decay."""
    num_epochs: Count = 1
    """Passes over the training rows."""
    max_steps: Count | None = None
    """Optimiser steps; when given it replaces num_epochs."""
    batch_size: Count = 8
    """Rows per micro-batch, all processes together."""
    gradient_accumulation_steps: Count = 1
    """Micro-batches per optimiser step."""
    max_grad_norm: AtLeastZero = 1.0
    """Clip of the global gradient norm; 0 turns it off."""
    max_prompt_tokens: Annotated[Count, Field(ge=16)] = 512
    """A longer prompt loses the end of its text, never its instruction."""
    max_answer_tokens: Count = 50
    """A longer answer loses its end."""
    checkpoint_steps: CountOrZero = 25
    """Optimiser steps between checkpoints; 0 keeps none."""
    gradient_checkpointing: Flag = False
    """Recompute activations in the backward pass: less memory, more time."""
    group_by_length: Flag = True
    """Fill batches with rows of similar length."""
    seed: Seed = 0
    """Seed of the adapter's initialisation and of the order of rows."""
    num_processes: Count = 1
    """Processes that share every micro-batch, one for each device; the result is the same to rounding."""
    quantize: Quantize = "none"
    """Precision of the frozen base model's linear layers: 8bit and 4bit (NF4) need CUDA and bitsandbytes."""

    def __post_init__(self) -> None:
        _require(
            self.batch_size % self.num_processes == 0,
            f"train.batch_size is {self.batch_size}, which train.num_processes, {self.num_processes}, do not share "
            "evenly; give a multiple of it.",
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


@settings("evaluate")
class EvaluateConfig:
    """How answers are generated and scored."""

    max_batch_tokens: Annotated[Count, Field(ge=64)] = 4096
    """Prompt tokens per batch, padding included."""
    max_new_tokens: Count = 50
    """Longest generated answer."""
    max_old_rows: Count = 5000
    """Test rows that a new version answers of all tasks before its own together; a task's share is always the same rows
    or fewer of them, so that versions are compared on the same ones."""


@settings("data")
class DataConfig:
    """What a landed file must satisfy, and how it is split."""

    test_share: Annotated[Positive, Field(lt=1)] = 0.2
    """Share of rows held out by hash when the file brings no split of its own."""
    max_bad_share: Share = 0.2
    """An arrival with a larger share of bad rows is refused whole."""
    max_text_chars: Count = 20_000
    """A row with a longer input or output is a bad row."""
    retain_training_rows: Flag = False
    """Whether the store keeps an arrival's training rows once they are learned; its test rows stay either way."""
    include_texts: Flag = False
    """Show texts of rows in logs, reports, notices and MLflow; without it rows appear there by number and digest alone.
    Off, since what was once copied out of the store stays where it went, whatever is deleted in the store later."""


Approval = Literal["automatic", "person"]


@settings("gate")
class GateConfig:
    """What a new version must satisfy to become champion. Points are hundredths of accuracy; None asks nothing.

    Limits against the base model are held as measured. Those against the champion allow for the test's own noise, told
    from the rows on which the two versions differ (Agresti and Min, 2005). A loss counts where it is above its limit
    as measured and noise alone does not explain it; the gain of the new task, where it falls short by more than noise.
    """

    min_accuracy: Share | None = None
    """Floor of the new task's accuracy, 0 to 1; None leaves the floor to min_gain_points alone."""
    min_gain_points: Number = 10.0
    """The new task must be this many points above the untouched base model, and above always giving one answer; or half
    of what these lack to all right, where that is less."""
    min_gain_over_champion_points: Number | None = 0.0
    """The new task may not fall short of the champion's accuracy plus this many points by more than noise."""
    max_drop_points: AtLeastZero = 10.0
    """No old task may lose more than this many points against the champion, unless noise explains the loss."""
    max_mean_drop_points: AtLeastZero | None = 5.0
    """Nor may the old tasks on average, where there are two or more; likewise."""
    max_perplexity_ratio: AtLeastOne | None = 1.5
    """Perplexity of plain English, against the untouched base model's, may grow to this multiple."""
    max_norm_ratio: AtLeastOne | None = 10.0
    """The adapter's norm ‖ΔW‖ may grow to this multiple of the champion's, or shrink to its inverse."""
    confidence: Annotated[Number, Field(ge=0.5, lt=1)] = 0.95
    """One-sided level of the paired intervals, 0.5 (noise is ignored) to below 1."""
    approval: Approval = "automatic"
    """person: a version that passes waits until somebody promotes it."""


Form = Literal["spectral", "literal"]
Core = Literal["frozen", "soft", "free"]
Sides = Literal["both", "A", "B"]
Kernel = Literal["heat", "linear_decay", "spline", "haar"]


@settings("deal")
class DealConfig:
    """DEAL: retention of the adapter's core spectrum and controlled updating (arXiv 2509.18942, Eq. 7-12).

    All but `core` and `interpolation` are for a soft or frozen core.
    """

    form: Form = "spectral"
    """spectral: slots of the (balanced) factors. literal: Eq. 8-12 on the raw factors, kept for comparison."""
    core: Core = "soft"
    """frozen: core slots never change. soft: they may, against the wall of lambda1. free: the factors are trained as
    they are, nothing is decomposed, and old answers are held by the rehearsal alone."""
    sides: Sides = "both"
    """Which factors are updated."""
    balanced: Flag = True
    """Rewrite the factors as P Σ^½ and Q Σ^½ when a task arrives; False keeps them raw."""
    energy: ShareAboveZero = 0.95
    """Core slots hold at least this share of ‖ΔW‖²_F."""
    free_share: ShareBelowOne = 0.25
    """At least this share of the slots is left free for the new task."""
    recycle: Flag = True
    """Empty the free slots and seed them anew; False lets the new task continue from what they hold, with one factor as
    long as a seed."""
    seed_scale: Positive = 1.0
    """Seeds of the free slots in units of PEFT's own; what is larger learns faster for the same rate."""
    project: Flag = True
    """Keep free rows of A out of the core's row space; needs the balanced form."""
    kernel: Kernel = "heat"
    """The retention filter: kernels of the singular value (heat, x·e^−x, quadratic spline), or haar: a gate on the
    one-level Haar transform of the features, for comparison."""
    widths: tuple[Positive, ...] = (0.25, 0.5, 1.0)
    """Widths σ_j of the kernels, in units of the largest singular value."""
    num_layers: CountOrZero = 1
    """K of Eq. 9; 0 turns the retention filter off."""
    mixing: Flag = True
    """Train the matrix Ω of Eq. 11 beside the offset b."""
    lambda1: AtLeastZero = 0.01
    """Weight of the core's deviation."""
    a: AtLeastOne = 5.0
    """Exponent of the core's deviation."""
    lambda2: AtLeastZero = 0.001
    """Weight of the update's size."""
    b: AtLeastOne = 2.0
    """Exponent of the update's size."""
    interpolation: ShareAboveZero = 1.0
    """γ: the version is (1 − γ)·parent + γ·trained, at the same rank; 1 keeps the trained adapter as it is."""
    tolerance: Positive = 0.1
    """ρ: relative deviation of a core slot at which the lambda1 term starts to bite."""

    def __post_init__(self) -> None:
        _require(bool(self.widths), "deal.widths is (); give one width at least.")
        _require(
            self.form == "spectral" or min(self.widths) >= 0.2,
            f"deal.widths is {self.widths}; the literal form's inverse kernel overflows below 0.2.",
        )
        _require(
            self.form == "spectral" or self.kernel == "heat",
            f"deal.kernel is {self.kernel!r}; the literal form has the heat kernel alone.",
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
        _require(self.a >= self.b, f"deal.a is {self.a} and deal.b is {self.b}; the method needs a >= b.")


Texts = Literal["none", "arrival", "stored", "both"]


@settings("rehearsal")
class RehearsalConfig:
    """Old tasks are asked again while a new one is learned; `deal` and `replay` read it."""

    texts: Texts = "arrival"
    """What the old tasks are asked about. arrival: texts of the new task, under the old tasks' instructions; nothing is
    kept of old data. stored: rows of the old tasks, kept with the adapter. both: half and half."""
    stored_share: ShareAboveZero = 0.02
    """Share of a task's training rows that `stored` and `both` keep."""
    num_texts: Count = 256
    """Questions made when the texts are the arrival's, shared out among the old tasks; fewer if the steps put fewer."""
    rows_per_step: Count = 4
    """Questions in every optimiser step, beside the batch."""
    weight: Positive = 1.0
    """Weight of their loss against the new task's."""
    temperature: Positive = 1.0
    """Softness of the answers that are held: of the parent's distribution and of the model's."""

    @property
    def keeps_rows(self) -> bool:
        """Whether rows of old tasks are stored."""
        return self.texts in ("stored", "both")

    @property
    def asks_about_arrival(self) -> bool:
        """Whether the new task's texts are asked about."""
        return self.texts in ("arrival", "both")


@settings("rivals")
class RivalConfig:
    """One knob each of the methods that `deal` is measured against."""

    o_lora_weight: AtLeastZero = 0.01
    """λ of O-LoRA's orthogonality (arXiv 2310.14152)."""
    ella_weight: AtLeastZero = 10_000.0
    """λ of ELLA's overlap with the past (arXiv 2601.02232)."""
    ewc_weight: AtLeastZero = 100.0
    """λ of EWC's quadratic penalty (arXiv 1612.00796)."""
    lwf_weight: AtLeastZero = 1.0
    """Weight of LwF's distillation (arXiv 1606.09282)."""
    lwf_temperature: Positive = 2.0
    """T of LwF's distillation."""


@settings("method")
class MethodConfig:
    """Settings of all strategies; each reads its own part."""

    deal: DealConfig = DealConfig()
    rehearsal: RehearsalConfig = RehearsalConfig()
    rivals: RivalConfig = RivalConfig()
