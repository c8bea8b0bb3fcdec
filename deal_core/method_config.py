"""Settings of the methods: DEAL, rehearsal, and the choice of rows."""

from __future__ import annotations

from dataclasses import fields, replace
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
    Positive,
    Share,
    ShareAboveZero,
    ShareBelowOne,
    require,
    settings,
)
from deal_core.safe_text import brief

Core = Literal["frozen", "soft", "free"]


def _changed(config: Any) -> list[str]:
    """The settings that differ from their defaults."""
    return [field.name for field in fields(config) if getattr(config, field.name) != field.default]


@settings("deal")
class DealConfig:
    """DEAL: retention of the adapter's core spectrum and controlled updating (arXiv 2509.18942, Eq. 7-12).

    All but `core` are for a soft or frozen core.
    """

    core: Core = "soft"
    """frozen: core slots never change. soft: core slots may change, at the cost of the lambda1 term. free: the factors
    are trained without a decomposition, and only the rehearsal preserves old answers."""
    energy: ShareAboveZero = 0.95
    """Core slots hold at least this share of ‖ΔW‖²_F."""
    free_share: ShareBelowOne = 0.25
    """At least this share of the slots stays free for the new task."""
    seed_scale: Positive = 1.0
    """Size of the free slots' seeds, in units of PEFT's. A larger value learns faster at the same learning rate."""
    widths: tuple[Positive, ...] = (0.25, 0.5, 1.0)
    """Widths σ_j of the retention filter's heat kernels, in units of the largest singular value."""
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
    tolerance: Positive = 0.1
    """ρ: relative deviation of a core slot at which the lambda1 term takes effect."""

    def __post_init__(self) -> None:
        require(bool(self.widths), "deal.widths is (); give at least one width.")
        idle = [f"deal.{name}" for name in _changed(self) if name != "core"]
        require(
            self.core != "free" or not idle,
            f"deal.core is free, which decomposes nothing, so {', '.join(idle)} would do nothing; leave it "
            "out, or set deal.core to soft or frozen.",
        )
        require(self.a >= self.b, f"deal.a is {self.a} and deal.b is {self.b}; the method needs a >= b.")


Texts = Literal["none", "arrival", "own", "stored", "both"]
Answers = Literal["parent", "first"]
Memory = Literal["none", "tests", "rows"]
MEMORY: dict[Memory, dict[str, Any]] = {
    "none": {"texts": "arrival"},
    "tests": {"texts": "own"},
    "rows": {"texts": "both", "stored_share": 0.1, "max_stored_rows": 200},
}
"""What a training may use of old tasks → the settings of the rehearsal."""
DEFAULT_MEMORY: Memory = "tests"
"""The memory of a new lineage of `deal` whose spec chooses none."""


@settings("rehearsal")
class RehearsalConfig:
    """Questions about old tasks while a new task is learned; `deal` and `replay` read these settings."""

    texts: Texts = "arrival"
    """Texts that the old tasks are asked about. arrival: texts of the new task, under the old tasks' instructions; no
    old data is kept. own: test rows of the old tasks, which then do not judge, and the new task's texts for a task that
    has no such rows. stored: rows of the old tasks, kept with the adapter. both: half of each."""
    answers: Answers = "parent"
    """Whose answers to their own texts the old tasks are held to (`own`). parent: the parent's, asked for with every
    arrival. first: those right after the task was learned, asked for once and kept with the adapter."""
    stored_share: ShareAboveZero = 0.02
    """Share of an arrival's training rows that `stored` and `both` keep."""
    max_stored_rows: Count | None = None
    """Most rows that are kept of one arrival; None: the share alone decides."""
    balance_stored: Flag = False
    """Keep rows of every label, in the shares that the labels have; False keeps a plain random sample."""
    num_texts: Count = 256
    """Questions made of the arrival's texts, divided among the old tasks. Fewer are made if the steps use fewer."""
    rows_per_step: Count = 4
    """Questions added to every optimiser step's batch."""
    weight: Positive = 1.0
    """Weight of the questions' loss relative to the new task's loss."""
    temperature: Positive = 1.0
    """Temperature that softens both the parent's and the model's distribution in the questions' loss."""

    def __post_init__(self) -> None:
        require(
            self.texts != "own" or self.temperature == 1,
            f"rehearsal.temperature is {self.temperature}, and re-centred answers have none; set it to 1, or memory to "
            "none.",
        )

    def with_memory(self, memory: Memory | None) -> RehearsalConfig:
        """Return the settings with those that `memory` stands for.

        Raises:
            ConfigError: One of these settings was changed as well, or a setting does nothing with this memory.
        """
        if memory is None:
            return self
        changed = self.decides_memory
        require(
            not changed,
            f"memory is {memory}, which decides rehearsal.{', rehearsal.'.join(changed)} too; remove one of the two.",
        )
        return replace(self, **MEMORY[memory]).checked()

    def checked(self) -> RehearsalConfig:
        """Return the settings, or raise ConfigError if `answers` does nothing. Before the memory is known it may."""
        require(
            self.answers == "parent" or self.texts == "own",
            f"rehearsal.answers is {self.answers}, which does nothing without texts of the old tasks' own; set memory "
            "to tests, or leave rehearsal.answers out.",
        )
        return self

    @property
    def decides_memory(self) -> list[str]:
        """The settings that were changed and that `memory` stands for."""
        return [name for name in _changed(self) if name in MEMORY["rows"]]

    def num_kept(self, num_rows: int) -> int:
        """Return how many rows of an arrival with `num_rows` rows are kept, if any are."""
        return min(max(1, round(self.stored_share * num_rows)), self.max_stored_rows or num_rows)

    @property
    def keeps_rows(self) -> bool:
        """Whether rows of old tasks are stored."""
        return self.texts in ("stored", "both")

    @property
    def keeps_answers(self) -> bool:
        """Whether answers to texts of old tasks are stored."""
        return self.texts == "own" and self.answers == "first"

    @property
    def asks_about_arrival(self) -> bool:
        """Whether questions are made of the new task's texts."""
        return self.texts in ("arrival", "own", "both")


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
    """The number that a row is chosen by: random, or one of an installed package."""
    score_options: dict[str, Any] = Field(default_factory=dict)
    """Settings of the score, which checks them itself."""
    pick: Pick = "high"
    """high, low: the rows with the largest or smallest scores. band: rows whose scores lie in the quantiles of `band`,
    at random. weighted: at random, with probabilities in proportion to exp(score / temperature)."""
    band: tuple[Share, Share] = (0.25, 0.75)
    """Smallest and largest quantile of `pick: band`."""
    temperature: Positive = 1.0
    """τ of `pick: weighted`. A small one takes the rows with the largest scores."""
    strata: Literal["label", "none"] = "label"
    """label: the labels keep their shares, and every label has a row if there is room. none: scores alone decide."""
    max_scored: Count = 20_000
    """Most rows that a model reads to choose among them. Of more rows, a random sample with the labels' shares is
    read."""
    noise: NoiseGate = "none"
    """Rows of a labelled task whose label is probably wrong. name: they are counted and named in the run's notes.
    leave_out: they are not trained on either."""

    def __post_init__(self) -> None:
        require(self.band[0] < self.band[1], f"selection.band is {self.band}; give the smaller quantile first.")
        changed = [name for name in _changed(self) if name not in ("keep", "noise", "max_scored", "score_options")]
        changed += ["score_options"] if self.score_options else []
        require(
            self.keep is not None or not changed,
            f"selection.{', selection.'.join(changed)} would do nothing: every row is trained on. Give selection.keep, "
            "a share such as 0.3 or a number of rows.",
        )

        for name, pick in (("band", "band"), ("temperature", "weighted")):
            require(
                name not in changed or self.pick == pick,
                f"selection.{name} would do nothing: selection.pick is {self.pick}. Leave it out, or set "
                f"selection.pick to {pick}.",
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
    selection: SelectionConfig = SelectionConfig()
    strategy_options: dict[str, Any] = Field(default_factory=dict)
    """Settings of a strategy of another package, which checks them itself (`Strategy.Options`)."""

    def __post_init__(self) -> None:
        self.rehearsal.checked()
