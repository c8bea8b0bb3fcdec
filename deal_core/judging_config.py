"""Settings of the gate, of a rollout and of monitoring."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from deal_core.limits import (
    AtLeastOne,
    AtLeastZero,
    Count,
    Number,
    Share,
    ShareAboveZero,
    require,
    settings,
)

Approval = Literal["automatic", "manual"]
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
    max_total_drop_points: AtLeastZero | None = None
    """Most points that a task may lose since it was learned, over all versions together: its forgetting budget. A
    version fails if it adds to a loss above that, and noise does not explain the loss. None: only neighbours are
    compared."""
    max_old_slice_drop_points: AtLeastZero | None = None
    """Most points that a task may lose on its test rows from before a renewal. None: the loss is only reported."""
    max_perplexity_ratio: AtLeastOne | None = 1.5
    """Largest perplexity of plain English, as a multiple of the untouched base model's."""
    max_general_drop_points: AtLeastZero | None = 10.0
    """Most points that a suite of evaluate.general may lose, against the untouched base model and against the champion.
    A loss that noise explains is allowed."""
    max_norm_ratio: AtLeastOne | None = 10.0
    """Largest norm ‖ΔW‖ of the adapter, as a multiple of the parent's. The inverse is the smallest."""
    confidence: Annotated[Number, Field(ge=0.5, lt=1)] = 0.95
    """One-sided level of the paired intervals, 0.5 (noise is ignored) to below 1."""
    arrival: Literal["hold", "warn", "off"] = "warn"
    """What happens to an arrival whose labels disagree with the champion, which is sure of its answers. hold: the
    arrival waits for `deal data release`. warn: a note says so, and the arrival is learned. off: nothing is said."""
    arrival_drop_points: AtLeastZero = 15.0
    """Points that the champion's score on an arrival may be below its score on the task's other rows."""
    approval: Approval = "automatic"
    """automatic: a version that passes is promoted. manual: it waits until a person promotes it."""
    unsure: Literal["promote", "approve"] = "promote"
    """What happens to a version that passes, although an old task has too few test rows to see a drop of
    max_drop_points. promote: nothing but a note. approve: it waits until a person promotes it. Of the versions
    that deal data delete --relearn makes, the last one alone waits: deal lineage branch accepts it."""
    rollout: Literal["none", "shadow", "canary"] = "none"
    """What a version that passes does before it becomes champion. shadow: it answers a copy of the requests, and its
    answers are never returned. canary: it answers a share of the requests. none: nothing. Only `deal serve` does it,
    `mlflow models serve` does not."""
    rollout_share: ShareAboveZero | None = None
    """Share of the requests that the version answers. None: 1 for shadow, 0.1 for canary."""
    rollout_rows: Count = 200
    """Answers of the version after which it becomes champion, if nothing speaks against it."""

    def __post_init__(self) -> None:
        require(
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


Sensitivity = Literal["low", "normal", "high"]


@dataclass(frozen=True, kw_only=True)
class DriftLimits:
    """When a difference between live traffic and test rows is an alarm.

    An alarm needs both: a p-value below alpha / (tests of all tasks together), and an effect of at least its limit.
    """

    min_rows: int = 100
    """Fewest live rows of a task; with fewer, nothing is compared."""
    window_rows: int = 500
    """The newest live rows of a task that are compared."""
    alpha: float = 0.01
    """Largest share of looks at a lineage that may raise a false alarm."""
    min_psi: float = 0.2
    """Smallest population stability index of the label shares that counts."""
    min_distance: float = 0.15
    """Smallest distance of two distributions (Kolmogorov-Smirnov), or of two shares, that counts."""
    min_auc: float = 0.7
    """Smallest area under the ROC curve that counts, for the classifier that tells live texts from test texts."""
    max_live_drop_points: float = 10.0
    """Points that live accuracy, measured or estimated, may lose against the test rows."""


DRIFT_LIMITS: dict[Sensitivity, DriftLimits] = {
    "low": DriftLimits(min_psi=0.3, min_distance=0.2, min_auc=0.8, max_live_drop_points=15.0),
    "normal": DriftLimits(),
    "high": DriftLimits(min_psi=0.1, min_distance=0.1, min_auc=0.6, max_live_drop_points=5.0),
}


@settings("monitor")
class MonitorConfig:
    """How live traffic is compared with a version's test rows. This changes no version and no digest."""

    sensitivity: Sensitivity = "normal"
    """How small a difference raises an alarm. Live accuracy may lose 15 (low), 10 (normal) or 5 points (high). The same
    share of false alarms is allowed with each: 1 of 100 looks."""

    @property
    def limits(self) -> DriftLimits:
        """The limits that the sensitivity stands for."""
        return DRIFT_LIMITS[self.sensitivity]
