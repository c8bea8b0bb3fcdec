"""What a comparison of live traffic with its reference found, task by task. `deal_core.monitoring.drift` compares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import ClassVar, Literal, get_args

from deal_core.errors import RegistryError
from deal_core.schema_version import Kept, VersionedJson

Status = Literal["compared", "too few rows", "no reference"]
AlarmKind = Literal["drift", "quality", "decayed"]
"""drift: live rows differ from the reference. quality: live accuracy is lower. decayed: it is also below what the gate
measured for the version before."""
ALARM_KINDS: tuple[AlarmKind, ...] = get_args(AlarmKind)

NUM_BINS = 20
"""Bins of a histogram of confidences, from 0 to 1."""

TestName = Literal["labels", "no label", "confidence", "label mass", "length of inputs", "length of answers", "texts"]
UNITS: dict[TestName, str] = {
    "labels": "PSI", "no label": "share", "confidence": "D", "label mass": "D", "length of inputs": "D",
    "length of answers": "D", "texts": "AUC",
}  # fmt: skip
"""A test → the unit of its effect."""


@dataclass(frozen=True, kw_only=True)
class DriftTest:
    """One test of a task.

    Attributes:
        name: What is compared.
        effect: Size of the difference, in the test's unit.
        limit: Smallest effect that counts.
        p_value: Probability of at least this difference by chance.
        low: Lower end of the 95 % interval around an AUC; None for other tests.
        high: Upper end.
        is_alarm: Whether the difference is significant and large.
    """

    name: TestName
    effect: float
    limit: float
    p_value: float
    low: float | None = None
    high: float | None = None
    is_alarm: bool = False

    @property
    def unit(self) -> str:
        """Unit of the effect."""
        return UNITS[self.name]


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """What has changed, and why it counts."""

    kind: AlarmKind
    reason: str


@dataclass(frozen=True, kw_only=True)
class LiveAccuracy:
    """An accuracy of live answers, 0 to 1.

    Attributes:
        accuracy: The estimate.
        low: Lower end of its 95 % Wilson interval.
        high: Upper end.
        num_rows: Live rows that it comes from.
        reference: Accuracy on the reference rows; None: their scores are graded, so the two cannot be compared.
        drop_points: Points below the reference; negative: above.
        p_value: Probability of at least this drop if nothing has changed (Fisher's exact test, one-sided).
        is_alarm: Whether the drop is significant and large.
    """

    accuracy: float
    low: float
    high: float
    num_rows: int
    reference: float | None = None
    drop_points: float | None = None
    p_value: float | None = None
    is_alarm: bool = False

    def is_below(self, accuracy: float) -> bool:
        """Whether the whole interval is below an accuracy."""
        return self.high < accuracy


@dataclass(frozen=True, kw_only=True)
class TaskDrift:
    """The comparison of one task.

    Attributes:
        task: Name of the task.
        status: Whether it was compared.
        num_logged: Live rows, repeated requests included.
        num_live: The newest live rows that are compared, without repeated requests.
        num_reference: Rows that they are compared with.
        is_rebased: Whether these rows are earlier live rows instead of test rows.
        tests: The tests that could be made.
        estimated: Accuracy estimated from confidences.
        measured: Accuracy measured by feedback.
        before: Accuracy that the gate measured for the version before; None: not known.
        alarms: The alarms.
        label_shares: Label → its share among the reference's and the live answers. An empty name: no label.
        confidences: Shares of the reference's and the live rows in each of NUM_BINS bins of confidence.
    """

    task: str
    status: Status
    num_logged: int
    num_live: int
    num_reference: int
    is_rebased: bool = False
    tests: tuple[DriftTest, ...] = ()
    estimated: LiveAccuracy | None = None
    measured: LiveAccuracy | None = None
    before: float | None = None
    alarms: tuple[Alarm, ...] = ()
    label_shares: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    confidences: tuple[tuple[float, float], ...] = ()

    @property
    def num_tests(self) -> int:
        """Number of the comparisons that may raise an alarm."""
        accuracies = [each for each in (self.estimated, self.measured) if each is not None]
        return len(self.tests) + sum(each.p_value is not None for each in accuracies)


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
        return next(each for each in self.tasks if each.task == name)


@dataclass(frozen=True, kw_only=True)
class LiveLook(VersionedJson):
    """One look at the live traffic of a version."""

    kept: ClassVar[Kept] = Kept("The look at live traffic", RegistryError, version=1)

    lineage: str
    version: str
    looked: datetime
    drift: DriftReport
