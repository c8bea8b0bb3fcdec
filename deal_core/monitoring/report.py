"""What a comparison of live traffic with its reference found, task by task. `deal_core.monitoring.drift` compares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Annotated, Literal, get_args

from deal_core.errors import RegistryError
from deal_core.schema_version import VersionedJson
from deal_core.shown import Shown

Status = Literal["compared", "too few rows", "no reference"]
AlarmKind = Literal["drift", "quality", "decayed"]
"""drift: live rows differ from the reference. quality: live accuracy is lower. decayed: it is also below what the gate
measured for the version before."""
ALARM_KINDS: tuple[AlarmKind, ...] = get_args(AlarmKind)

NUM_BINS = 20
"""Bins of a histogram of confidences, from 0 to 1."""

TestName = Literal["labels", "no label", "confidence", "label mass", "length of inputs", "length of answers", "texts"]
UNITS: dict[TestName, str] = {
    "labels": "PSI",
    "no label": "share",
    "confidence": "D",
    "label mass": "D",
    "length of inputs": "D",
    "length of answers": "D",
    "texts": "AUC",
}
"""A test → the unit of its effect."""


@dataclass(frozen=True, kw_only=True)
class DriftTest:
    """One test of a task."""

    name: Annotated[TestName, Shown("what", of="what")]
    effect: Annotated[float, Shown(format=".3f")]
    """Size of the difference, in the test's unit."""
    limit: Annotated[float, Shown(format="g")]
    """Smallest effect that counts."""
    p_value: Annotated[float, Shown("p", format=".1e")]
    """Probability of at least this difference by chance."""
    low: float | None = None
    """Lower end of the 95 % interval around an AUC; None for other tests."""
    high: float | None = None
    is_alarm: Annotated[bool, Shown("result", words={True: "alarm", False: ""}, is_state=True)] = False
    """Whether the difference is significant and large."""

    @property
    def unit(self) -> str:
        """Unit of the effect."""
        return UNITS[self.name]

    @property
    def what(self) -> str:
        """What is compared, and the unit of the effect."""
        return f"{self.name}, {self.unit}"


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """What has changed, and why it counts."""

    kind: AlarmKind
    reason: str


@dataclass(frozen=True, kw_only=True)
class LiveAccuracy:
    """An accuracy of live answers, 0 to 1."""

    accuracy: Annotated[float, Shown("now", unit="%")]
    low: Annotated[float, Shown("from", unit="%")]
    """Lower end of its 95 % Wilson interval."""
    high: Annotated[float, Shown("to", unit="%")]
    num_rows: Annotated[int, Shown("rows")]
    """Live rows that it comes from."""
    reference: Annotated[float | None, Shown("test rows", unit="%")] = None
    """Accuracy on the reference rows; None: their scores are graded, so the two cannot be compared."""
    drop_points: float | None = None
    """Points below the reference; negative: above."""
    p_value: float | None = None
    """Probability of at least this drop if nothing has changed (Fisher's exact test, one-sided)."""
    is_alarm: bool = False
    """Whether the drop is significant and large."""

    def is_below(self, accuracy: float) -> bool:
        """Whether the whole interval is below an accuracy."""
        return self.high < accuracy


@dataclass(frozen=True, kw_only=True)
class TaskDrift:
    """The comparison of one task."""

    task: Annotated[str, Shown()]
    status: Status
    num_logged: int
    """Live rows, repeated requests included."""
    num_live: Annotated[int, Shown("live rows")]
    """The newest live rows that are compared, without repeated requests."""
    num_reference: Annotated[int, Shown("reference")]
    """Rows that they are compared with."""
    is_of_live_rows: bool = False
    """Whether these rows are earlier live rows instead of test rows."""
    tests: tuple[DriftTest, ...] = ()
    estimated: LiveAccuracy | None = None
    """Accuracy estimated from confidences."""
    measured: LiveAccuracy | None = None
    """Accuracy measured by feedback."""
    before: float | None = None
    """Accuracy that the gate measured for the version before; None: not known."""
    alarms: tuple[Alarm, ...] = ()
    label_shares: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Label → its share among the reference's and the live answers. An empty name: no label."""
    confidences: tuple[tuple[float, float], ...] = ()
    """Shares of the reference's and the live rows in each of NUM_BINS bins of confidence."""

    @property
    def num_tests(self) -> int:
        """Number of the comparisons that may raise an alarm."""
        accuracies = (self.estimated, self.measured)
        return len(self.tests) + sum(accuracy is not None and accuracy.p_value is not None for accuracy in accuracies)


@dataclass(frozen=True, kw_only=True)
class DriftReport:
    """The comparison of all tasks of a version."""

    tasks: tuple[TaskDrift, ...]
    num_tests: int
    """Tests of all tasks together."""
    level: float
    """A p-value below it is significant: alpha / num_tests."""

    def task(self, name: str) -> TaskDrift:
        """Return the comparison of a task."""
        return next(task for task in self.tasks if task.task == name)


@dataclass(frozen=True, kw_only=True)
class LiveLook(VersionedJson, what="The look at live traffic", error=RegistryError, version=1):
    """One look at the live traffic of a version."""

    lineage: str
    version: str
    looked: datetime
    drift: DriftReport
