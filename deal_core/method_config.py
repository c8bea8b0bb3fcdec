"""Settings of the methods: DEAL, rehearsal, and the choice of rows."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from deal_core.errors import ConfigError
from deal_core.limits import (
    MAX_COUNT,
    AtLeastZero,
    Count,
    CountOrZero,
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

    All but `core` are for a soft or frozen core. The constants of the method are no settings: nothing that was tried in
    their place was better.

    Attributes:
        seed_scale: Size of the free slots' seeds, in units of PEFT's.
        widths: Widths σ_j of the retention filter's heat kernels, in units of the largest singular value.
        num_layers: K of Eq. 9; 0 turns the retention filter off.
        mixing: Whether the matrix Ω of Eq. 11 is trained as well as the offset b.
        a: Exponent of the core's deviation; at least `b`.
        b: Exponent of the update's size.
        tolerance: ρ: relative deviation of a core slot at which the lambda1 term takes effect.
    """

    seed_scale: ClassVar[float] = 1.0
    widths: ClassVar[tuple[float, ...]] = (0.25, 0.5, 1.0)
    num_layers: ClassVar[int] = 1
    mixing: ClassVar[bool] = True
    a: ClassVar[float] = 5.0
    b: ClassVar[float] = 2.0
    tolerance: ClassVar[float] = 0.1

    core: Core = "soft"
    """frozen: core slots never change. soft: core slots may change, at the cost of the lambda1 term. free: the factors
    are trained without a decomposition, and only the rehearsal preserves old answers."""
    energy: ShareAboveZero = 0.95
    """Core slots hold at least this share of ‖ΔW‖²_F."""
    free_share: ShareBelowOne = 0.25
    """At least this share of the slots stays free for the new task."""
    lambda1: AtLeastZero = 0.01
    """Weight of the core's deviation."""
    lambda2: AtLeastZero = 0.001
    """Weight of the update's size."""

    def __post_init__(self) -> None:
        idle = [f"deal.{name}" for name in _changed(self) if name != "core"]
        require(
            self.core != "free" or not idle,
            f"deal.core is free, which decomposes nothing, so {', '.join(idle)} would do nothing; leave it "
            "out, or set deal.core to soft or frozen.",
        )


@settings("rehearsal")
class RehearsalConfig:
    """Rows of old tasks that are learned again while a new task is learned; `deal` and `replay` read these settings."""

    rows: CountOrZero = 50
    """Most training rows that are kept of each task, with the adapter: of a task with fewer than four times as many, a
    quarter of its rows. Every label keeps its share. 0 keeps none; old tasks are then rehearsed on the new task's
    texts, with the parent version's answers."""
    per_step: Count = 4
    """Rehearsed rows in every optimiser step, besides those of the new task."""

    def num_kept(self, num_rows: int) -> int:
        """Return how many rows are kept of a task that was trained on `num_rows` rows."""
        return min(self.rows, max(1, round(num_rows / 4)))


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
    """Which rows of an arrival are trained on. Every strategy heeds it, since it comes before the strategy.

    Attributes:
        max_scored: Most rows that a model reads to choose among them. Of more rows, a random sample is read.
    """

    max_scored: ClassVar[int] = 20_000

    keep: Annotated[ShareAboveZero | Annotated[Count, Field(ge=2)] | None, BeforeValidator(_check_keep)] = None
    """Rows that are trained on: a share (0.01, 1.0) or a number from 2 (1000). None: every row. The labels keep their
    shares, and every label has a row if there is room."""
    score: str = "random"
    """The number that a row is chosen by, the largest first: random, or one of an installed package."""
    score_options: dict[str, Any] = Field(default_factory=dict)
    """Settings of the score, which checks them itself."""
    noise: NoiseGate = "none"
    """Rows of a labelled task whose label is probably wrong. name: they are counted and named in the run's notes.
    leave_out: they are not trained on either."""

    def __post_init__(self) -> None:
        changed = [name for name in _changed(self) if name not in ("keep", "noise", "score_options")]
        changed += ["score_options"] if self.score_options else []
        require(
            self.keep is not None or not changed,
            f"selection.{', selection.'.join(changed)} would do nothing: every row is trained on. Give selection.keep, "
            "a share such as 0.3 or a number of rows.",
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
