"""Settings of the algorithm: frozen dataclasses, checked when they are made.

Each field declares its limits, so a spec, Python and a server's parameter form all apply the same ones. This module
does not import torch, so the command line reads a spec without it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from deal_core.errors import ConfigError
from deal_core.limits import (
    MAX_COUNT,
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
from deal_core.safe_text import brief

FORBID_UNKNOWN: dict[str, Any] = {"extra": "forbid"}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@settings("adapter")
class AdapterConfig:
    """Shape of a lineage's LoRA adapter. All versions of the lineage share it."""

    rank: Annotated[Count, Field(ge=2)] = 16
    """r: number of columns of B and rows of A."""
    alpha: Positive | None = None
    """Scale α of ΔW = (α/r)·B·A; None means 2·rank."""
    target_modules: tuple[str, ...] | None = None
    """Names of the linear layers that carry the adapter; None means the model type's query and value projections."""

    @property
    def scale_alpha(self) -> float:
        """α, or 2·rank if alpha is None."""
        return 2.0 * self.rank if self.alpha is None else self.alpha


Quantize = Literal["none", "8bit", "4bit"]
Schedule = Literal["constant", "linear"]
ReportTool = Literal["tensorboard", "wandb", "trackio"]
LATER: dict[str, dict[str, Any]] = {
    "train": {"quantize": "none", "schedule": "constant", "min_steps": 0, "balance_labels": False, "report_to": ()},
    "gate": {"max_old_slice_drop_points": None, "alias_moves": "follow", "judge": "none", "max_judged_rows": 100,
             "rollout": "none", "rollout_share": None, "rollout_rows": 200},
    "task": {"metric": None, "assistant_turns": None, "prompt": None},
    "rehearsal": {"max_stored_rows": None, "balance_stored": False, "parent_share": 0.0},
}
"""Section → settings that the first release did not have → the value that changes nothing."""


def known_before(section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a section without later settings that change nothing. Digests of these values stay the same."""
    later = LATER.get(section, {})
    return {name: value for name, value in values.items() if name not in later or value != later[name]}


def as_stored(section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """A section as it was stored, with the later settings that `known_before` left out; today's defaults may differ."""
    return {**LATER.get(section, {}), **values}


@settings("train")
class TrainConfig:
    """How one task is learned. All strategies use these settings."""

    learning_rate: Positive = 1e-3
    """Rate of AdamW at the first step; no warm-up, no weight decay."""
    schedule: Schedule = "linear"
    """Course of the learning rate: it falls linearly to zero at the last step, or it stays constant."""
    num_epochs: Count = 3
    """Passes over the training rows. One pass over 150 rows is 19 steps, which are too few."""
    min_steps: CountOrZero = 0
    """Fewest optimiser steps: a task with few rows is passed over more often than num_epochs says."""
    max_steps: Count | None = None
    """Optimiser steps; a value here replaces num_epochs and min_steps."""
    batch_size: Count = 8
    """Rows per micro-batch, summed over all processes."""
    gradient_accumulation_steps: Count = 1
    """Micro-batches per optimiser step."""
    max_grad_norm: AtLeastZero = 1.0
    """Clip of the global gradient norm; 0 turns it off."""
    max_prompt_tokens: Annotated[Count, Field(ge=16)] = 512
    """The text of a longer prompt is cut at its end. The instruction is never cut."""
    max_answer_tokens: Count = 50
    """A longer answer is cut at its end."""
    checkpoint_steps: CountOrZero = 25
    """Optimiser steps between checkpoints; 0 keeps none."""
    gradient_checkpointing: Flag = False
    """Recompute activations in the backward pass: less memory, more time."""
    group_by_length: Flag = True
    """Fill batches with rows of similar length."""
    balance_labels: Flag = True
    """Give every batch the labels in the shares that they have among all rows."""
    seed: Seed = 0
    """Seed of the adapter's initialisation and of the order of rows."""
    num_processes: Count = 1
    """Processes that share every micro-batch, one per device. The result differs only by rounding."""
    quantize: Quantize = "none"
    """Precision of the frozen base model's linear layers: 8bit and 4bit (NF4) need CUDA and bitsandbytes."""
    report_to: tuple[ReportTool, ...] = ()
    """Tools that get the loss and the rate of every step, in addition to MLflow. They must be installed."""

    def __post_init__(self) -> None:
        _require(
            self.batch_size % self.num_processes == 0,
            f"train.batch_size is {self.batch_size}, which is no multiple of train.num_processes, "
            f"{self.num_processes}; give a multiple.",
        )

    def deciding(self) -> dict[str, Any]:
        """The settings that decide the result, for digests: all but num_processes and report_to."""
        values = asdict(self)
        del values["num_processes"], values["report_to"]
        return known_before("train", values)

    def num_steps(self, num_rows: int) -> int:
        """Optimiser steps for a task with `num_rows` training rows."""
        rows_per_step = self.batch_size * self.gradient_accumulation_steps
        return self.max_steps or max(math.ceil(num_rows / rows_per_step) * self.num_epochs, self.min_steps)


METRICS = ("exact", "contains", "rouge_l", "json_fields", "loss")
"""The metrics of a task; `deal_core.evaluation.answer_scores` has their functions."""
_OWN_METRIC = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def check_metric(metric: str) -> str:
    """Return a metric's name.

    Raises:
        ConfigError: It is neither a known metric nor of the form module:function.
    """
    if metric not in METRICS and not _OWN_METRIC.fullmatch(metric):
        raise ConfigError(
            f"task.metric is {brief(metric)}; use one of {', '.join(METRICS)}, or module:function for your own."
        )
    return metric


@settings("evaluate")
class EvaluateConfig:
    """How answers are generated and scored."""

    max_batch_tokens: Annotated[Count, Field(ge=64)] = 4096
    """Prompt tokens per batch, padding included."""
    max_new_tokens: Count = 50
    """Longest generated answer."""
    max_old_rows: Count = 5000
    """Most test rows of all earlier tasks together that a new version answers. A task's rows stay the same from version
    to version, or become fewer of the same rows, so versions are compared on common rows."""


@settings("data")
class DataConfig:
    """Limits for a landed file, and the settings of its split."""

    test_share: Annotated[Positive, Field(lt=1)] = 0.2
    """Share of rows held out as test rows, chosen by hash. A split in the file replaces it."""
    max_bad_share: Share = 0.2
    """A file with a larger share of bad rows is refused as a whole."""
    max_text_chars: Count = 20_000
    """A row with a longer input or output is a bad row."""
    retain_training_rows: Flag = False
    """Whether the store keeps training rows after they are learned. Test rows are always kept."""
    include_texts: Flag = False
    """Show the texts of rows in logs, reports, notices and MLflow. If False, rows appear there by number and digest.
    The default is False because deleting a row from the store does not delete copies of its text elsewhere."""


Approval = Literal["automatic", "person"]
AliasMoves = Literal["follow", "request"]
JudgeUse = Literal["none", "report", "veto"]
RolloutKind = Literal["shadow", "canary"]
ROLLOUT_SHARES: dict[RolloutKind, float] = {"shadow": 1.0, "canary": 0.1}
"""The share of the requests that a candidate answers, unless the settings name one."""


@dataclass(frozen=True)
class RolloutTerms:
    """How an accepted version is tried on live traffic, and when that ends."""

    kind: RolloutKind
    share: float
    """Share of the requests that the version answers, above 0 and at most 1."""
    num_rows: int
    """Answers that are judged before the version becomes champion."""
    max_drop_points: float
    """Points that the version may lose against the champion."""
    confidence: float
    """One-sided level of the intervals, over all looks together."""



@settings("gate")
class GateConfig:
    """Limits that a new version must keep to become champion. A point is 0.01 of accuracy; None turns a limit off.

    Limits against the base model use the measured figures. Limits against the champion allow for noise, which is
    estimated from the rows on which the two versions differ (Agresti and Min, 2005). A loss counts if it is above its
    limit and noise does not explain it. A gain counts as missed if it falls short by more than noise.
    """

    min_accuracy: Share | None = None
    """Lowest accuracy of the new task, 0 to 1. None: only min_gain_points sets a floor."""
    min_gain_points: Number = 10.0
    """Points by which the new task must beat the untouched base model and the best constant answer. If the better of
    the two is close to 100 %, half of its distance to 100 % is enough."""
    min_gain_over_champion_points: Number | None = 0.0
    """Points by which the new task must beat the champion. A version fails if it falls short by more than noise."""
    max_drop_points: AtLeastZero = 10.0
    """Most points that an old task may lose against the champion. A loss that noise explains is allowed."""
    max_mean_drop_points: AtLeastZero | None = 5.0
    """Most points that the old tasks may lose on average, if there are two or more. Noise is allowed here too."""
    max_old_slice_drop_points: AtLeastZero | None = None
    """Most points that a task may lose on its test rows from before a renewal. None: the loss is only reported."""
    max_perplexity_ratio: AtLeastOne | None = 1.5
    """Largest perplexity of plain English, as a multiple of the untouched base model's."""
    max_norm_ratio: AtLeastOne | None = 10.0
    """Largest norm ‖ΔW‖ of the adapter, as a multiple of the parent's. The inverse is the smallest."""
    confidence: Annotated[Number, Field(ge=0.5, lt=1)] = 0.95
    """One-sided level of the paired intervals, 0.5 (noise is ignored) to below 1."""
    judge: JudgeUse = "none"
    """A language model compares free answers with the champion's (DEAL_JUDGE_URL, DEAL_JUDGE_MODEL). report: the notes
    have its verdicts. veto: a task in which it prefers the champion by more than max_drop_points, beyond noise, rejects
    the version too. The judge gets the texts of test rows and their answers."""
    max_judged_rows: Count = 100
    """Most test rows of a task that the judge compares. Each takes two requests."""
    approval: Approval = "automatic"
    """automatic: a version that passes is promoted. person: it waits until a person promotes it."""
    alias_moves: AliasMoves = "follow"
    """What `champion` does when somebody moves it in MLflow. follow: servers serve the version until the next command
    or run sets the alias back. request: the alias is set back at once, and a person is asked. Only the value in
    the lineage's file has an effect."""
    rollout: Literal["none", "shadow", "canary"] = "none"
    """What a version that passes does before it becomes champion. shadow: it answers a copy of the requests, and its
    answers are never returned. canary: it answers a share of the requests. none: nothing. Only `deal serve` does it,
    vLLM and `mlflow models serve` do not."""
    rollout_share: ShareAboveZero | None = None
    """Share of the requests that the version answers. None: 1 for shadow, 0.1 for canary."""
    rollout_rows: Count = 200
    """Answers of the version that are judged before it becomes champion."""

    def __post_init__(self) -> None:
        _require(
            not (self.rollout == "canary" and self.rollout_share == 1),
            "gate.rollout_share is 1: a canary is compared with the champion's answers to the other requests; give a "
            "smaller share.",
        )

    @property
    def rollout_terms(self) -> RolloutTerms | None:
        """How a version is tried on live traffic; None: it is not."""
        if self.rollout == "none":
            return None
        share = ROLLOUT_SHARES[self.rollout] if self.rollout_share is None else self.rollout_share
        return RolloutTerms(self.rollout, share, self.rollout_rows, self.max_drop_points, self.confidence)


@settings("monitor")
class MonitorConfig:
    """How live traffic is compared with a version's test rows. These settings change no version and no digest.

    An alarm needs both: a p-value below alpha / (tests of all tasks together), and an effect of at least its limit.
    """

    min_rows: Count = 100
    """Fewest live rows of a task; with fewer, nothing is compared."""
    window_rows: Count = 500
    """The newest live rows of a task that are compared."""
    alpha: Annotated[Positive, Field(lt=1)] = 0.01
    """Largest share of looks at a lineage that may raise a false alarm."""
    min_psi: AtLeastZero = 0.2
    """Smallest population stability index of the label shares that counts."""
    min_distance: Share = 0.15
    """Smallest distance of two distributions (Kolmogorov-Smirnov), or of two shares, that counts."""
    min_auc: Annotated[Number, Field(ge=0.5, le=1)] = 0.7
    """Smallest area under the ROC curve that counts, for the classifier that tells live texts from test texts."""
    max_live_drop_points: AtLeastZero = 10.0
    """Points that live accuracy, measured or estimated, may lose against the test rows."""


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
    """frozen: core slots never change. soft: core slots may change, at the cost of the lambda1 term. free: the factors
    are trained without a decomposition, and only the rehearsal preserves old answers."""
    sides: Sides = "both"
    """Which factors are updated."""
    balanced: Flag = True
    """Rewrite the factors as P Σ^½ and Q Σ^½ when a task arrives. False leaves the factors unchanged."""
    energy: ShareAboveZero = 0.95
    """Core slots hold at least this share of ‖ΔW‖²_F."""
    free_share: ShareBelowOne = 0.25
    """At least this share of the slots stays free for the new task."""
    recycle: Flag = True
    """Empty the free slots and draw new seeds for them. False keeps their content: the new task continues from it, with
    one factor of each free slot scaled to the length of a seed."""
    seed_scale: Positive = 1.0
    """Size of the free slots' seeds, in units of PEFT's. A larger value learns faster at the same learning rate."""
    project: Flag = True
    """Keep the free rows of A orthogonal to the core's row space; needs the balanced form."""
    kernel: Kernel = "heat"
    """The retention filter: kernels of the singular value (heat, x·e^−x, quadratic spline), or haar: a gate on the
    one-level Haar transform of the features, for comparison."""
    widths: tuple[Positive, ...] = (0.25, 0.5, 1.0)
    """Widths σ_j of the kernels, in units of the largest singular value."""
    num_layers: CountOrZero = 1
    """K of Eq. 9; 0 turns the retention filter off."""
    mixing: Flag = True
    """Train the matrix Ω of Eq. 11 as well as the offset b."""
    lambda1: AtLeastZero = 0.01
    """Weight of the core's deviation."""
    a: AtLeastOne = 5.0
    """Exponent of the core's deviation."""
    lambda2: AtLeastZero = 0.001
    """Weight of the update's size."""
    b: AtLeastOne = 2.0
    """Exponent of the update's size."""
    interpolation: ShareAboveZero = 1.0
    """γ: the version is (1 − γ)·parent + γ·trained, at the same rank. 1 keeps the trained adapter unchanged."""
    tolerance: Positive = 0.1
    """ρ: relative deviation of a core slot at which the lambda1 term takes effect."""

    def __post_init__(self) -> None:
        _require(bool(self.widths), "deal.widths is (); give at least one width.")
        _require(
            self.form == "spectral" or min(self.widths) >= 0.2,
            f"deal.widths is {self.widths}; the literal form's inverse kernel overflows below 0.2.",
        )
        _require(
            self.form == "spectral" or self.kernel == "heat",
            f"deal.kernel is {self.kernel!r}; the literal form has only the heat kernel.",
        )
        changed = [each.name for each in fields(self) if getattr(self, each.name) != each.default]
        idle = [f"deal.{name}" for name in changed if name not in ("core", "interpolation")]
        _require(
            self.core != "free" or not idle,
            f"deal.core is free, which decomposes nothing, so {', '.join(idle)} would do nothing; leave it "
            "out, or set deal.core to soft or frozen.",
        )
        _require(
            self.balanced or not self.recycle or self.form == "literal" or self.core == "free",
            "deal.balanced is false and deal.recycle is true: a slot of the raw factors mixes several directions, "
            "so emptying a slot would lose what was learned; set deal.recycle to false too.",
        )
        _require(self.a >= self.b, f"deal.a is {self.a} and deal.b is {self.b}; the method needs a >= b.")


Texts = Literal["none", "arrival", "stored", "both"]
Memory = Literal["none", "rows"]
MEMORY: dict[Memory, dict[str, Any]] = {
    "none": {"texts": "arrival"},
    "rows": {"texts": "both", "stored_share": 0.1, "max_stored_rows": 200},
}
"""What a lineage may keep of its training rows → the settings of the rehearsal."""


@settings("rehearsal")
class RehearsalConfig:
    """Questions about old tasks while a new task is learned; `deal` and `replay` read these settings."""

    texts: Texts = "arrival"
    """Texts that the old tasks are asked about. arrival: texts of the new task, under the old tasks' instructions; no
    old data is kept. stored: rows of the old tasks, kept with the adapter. both: half of each."""
    stored_share: ShareAboveZero = 0.02
    """Share of an arrival's training rows that `stored` and `both` keep."""
    max_stored_rows: Count | None = None
    """Most rows that are kept of one arrival; None: the share alone decides."""
    balance_stored: Flag = False
    """Keep rows of every label, in the shares that the labels have; False keeps a plain random sample."""
    parent_share: Share = 0.0
    """Share of the parent's own answer in the target of a stored row; its label has the rest (after DER++,
    arXiv 2004.07211). 0 holds a stored row to its label alone."""
    num_texts: Count = 256
    """Questions made of the arrival's texts, divided among the old tasks. Fewer are made if the steps use fewer."""
    rows_per_step: Count = 4
    """Questions added to every optimiser step's batch."""
    weight: Positive = 1.0
    """Weight of the questions' loss relative to the new task's loss."""
    temperature: Positive = 1.0
    """Temperature that softens both the parent's and the model's distribution in the questions' loss."""

    def with_memory(self, memory: Memory | None) -> RehearsalConfig:
        """Return the settings with those that `memory` stands for.

        Raises:
            ConfigError: One of these settings was changed as well.
        """
        if memory is None:
            return self
        changed = self.decides_memory
        _require(
            not changed,
            f"memory is {memory}, which decides rehearsal.{', rehearsal.'.join(changed)} too; remove one of the two.",
        )
        return replace(self, **MEMORY[memory])

    @property
    def decides_memory(self) -> list[str]:
        """The settings that were changed and that `memory` stands for."""
        return [name for name in MEMORY["rows"] if getattr(self, name) != getattr(RehearsalConfig(), name)]

    def num_kept(self, num_rows: int) -> int:
        """Return how many rows of an arrival with `num_rows` rows are kept, if any are."""
        return min(max(1, round(self.stored_share * num_rows)), self.max_stored_rows or num_rows)

    @property
    def keeps_rows(self) -> bool:
        """Whether rows of old tasks are stored."""
        return self.texts in ("stored", "both")

    @property
    def asks_about_arrival(self) -> bool:
        """Whether questions are made of the new task's texts."""
        return self.texts in ("arrival", "both")


@settings("rivals")
class RivalConfig:
    """Settings of the methods that `deal` is compared with."""

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


Pick = Literal["high", "low", "band", "weighted"]
NoiseGate = Literal["none", "name", "leave_out"]


def _check_keep(keep: object) -> object:
    is_share, is_number = isinstance(keep, float) and 0 < keep <= 1, isinstance(keep, int) and 1 <= keep <= MAX_COUNT
    if keep is not None and (isinstance(keep, bool) or not (is_share or is_number)):
        raise ConfigError(
            f"selection.keep is {brief(keep)}; give a share above 0 and at most 1.0, or a number of rows from 2."
        )
    return keep


@settings("selection")
class SelectionConfig:
    """Which rows of an arrival are trained on. Every strategy heeds it, since it comes before the strategy."""

    keep: Annotated[ShareAboveZero | Annotated[Count, Field(ge=2)] | None, BeforeValidator(_check_keep)] = None
    """Rows that are trained on: a share (0.01, 1.0) or a number from 2 (1000). None: every row."""
    score: str = "random"
    """The number that a row is chosen by: random, length, loss, difficulty, errors, or an installed package's."""
    pick: Pick = "high"
    """high, low: the rows with the largest or smallest scores. band: rows whose scores lie in the quantiles of `band`,
    at random. weighted: at random, with probabilities in proportion to exp(score / temperature)."""
    band: tuple[Share, Share] = (0.25, 0.75)
    """Smallest and largest quantile of `pick: band`."""
    temperature: Positive = 1.0
    """τ of `pick: weighted`. A small one takes the rows with the largest scores."""
    target: Share = 0.5
    """Share of wrong answers that the score `difficulty` prefers."""
    strata: Literal["label", "none"] = "label"
    """label: the labels keep their shares, and every label has a row if there is room. none: scores alone decide."""
    max_scored: Count = 20_000
    """Most rows that a model reads to choose among them. Of more rows, a random sample with the labels' shares is
    read."""
    noise: NoiseGate = "none"
    """Rows of a labelled task whose label is probably wrong. name: they are counted and named in the run's notes.
    leave_out: they are not trained on either."""

    def __post_init__(self) -> None:
        _require(
            self.band[0] < self.band[1], f"selection.band is {self.band}; give the smaller quantile first."
        )
        changed = [
            each.name for each in fields(self)
            if each.name not in ("keep", "noise", "max_scored") and getattr(self, each.name) != each.default
        ]
        _require(
            self.keep is not None or not changed,
            f"selection.{', selection.'.join(changed)} would do nothing: every row is trained on. Give selection.keep, "
            "a share such as 0.3 or a number of rows.",
        )

        used_by = {"band": ("pick", "band"), "temperature": ("pick", "weighted"), "target": ("score", "difficulty")}
        for name, (setting, value) in used_by.items():
            _require(
                name not in changed or getattr(self, setting) == value,
                f"selection.{name} would do nothing: selection.{setting} is {getattr(self, setting)}. Leave it out, or "
                f"set selection.{setting} to {value}.",
            )

    @property
    def is_on(self) -> bool:
        """Whether anything is chosen or named."""
        return self.keep is not None or self.noise != "none"

    def num_kept(self, num_rows: int) -> int:
        """Return how many of `num_rows` training rows are trained on, before the noise gate leaves rows out."""
        if self.keep is None:
            return num_rows
        return min(num_rows, self.keep if isinstance(self.keep, int) else max(1, round(self.keep * num_rows)))


@settings("method")
class MethodConfig:
    """Settings of all strategies; each reads its own part. All heed `selection`."""

    deal: DealConfig = DealConfig()
    rehearsal: RehearsalConfig = RehearsalConfig()
    rivals: RivalConfig = RivalConfig()
    selection: SelectionConfig = SelectionConfig()
