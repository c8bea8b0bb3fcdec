"""Compare the live traffic of a version with its reference: the version's answers to the frozen test rows.

The frames have the columns of `deal_core.monitoring.predictions`; the reference has `score` too, each row's score by
the task's metric. Each task is compared by itself. Rows of other versions must not be among the live rows.

Example:
    >>> report = compare(reference, live, MonitorConfig())  # doctest: +SKIP
    >>> [alarm.reason for alarm in report.task("bank").alarms]  # doctest: +SKIP
    ['labels: PSI 0.61, limit 0.2 (p = 2e-14); fee dispute 21 % → 58 %']
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import ClassVar, Literal, get_args

import numpy as np
import pandas as pd

from deal_core.config import MonitorConfig
from deal_core.errors import RegistryError
from deal_core.monitoring import two_samples
from deal_core.monitoring.live_accuracy import LiveAccuracy, estimated_accuracy, measured_accuracy
from deal_core.monitoring.two_samples import Difference
from deal_core.schema_version import Kept, VersionedJson

Status = Literal["compared", "too few rows", "no reference"]
AlarmKind = Literal["drift", "quality", "decayed"]
"""drift: live rows differ from the reference. quality: live accuracy is lower. decayed: it is also below what the gate
measured for the version before."""
ALARM_KINDS: tuple[AlarmKind, ...] = get_args(AlarmKind)

NUM_BINS = 20
"""Bins of a histogram of confidences, from 0 to 1."""
MIN_MOVED = 0.05
"""Change of a label's share that a reason mentions."""
MAX_MOVED = 3
"""Labels that a reason mentions."""

TestName = Literal["labels", "no label", "confidence", "label mass", "length of inputs", "length of answers", "texts"]
UNITS: dict[TestName, str] = {
    "labels": "PSI", "no label": "share", "confidence": "D", "label mass": "D", "length of inputs": "D",
    "length of answers": "D", "texts": "AUC",
}  # fmt: skip
"""A test → the unit of its effect."""
DISTRIBUTIONS: dict[TestName, str] = {
    "confidence": "confidence", "label mass": "label_mass", "length of inputs": "chars",
    "length of answers": "num_answer_chars",
}  # fmt: skip
"""A test of two distributions → the column that it compares."""


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

    @property
    def reference_accuracy(self) -> float | None:
        """Accuracy on the test rows, where live accuracy was compared with it."""
        found = [each.reference for each in (self.measured, self.estimated) if each is not None]
        return next((each for each in found if each is not None), None)


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


def compare(
    reference: pd.DataFrame, live: pd.DataFrame, config: MonitorConfig, *, feedback: pd.DataFrame | None = None,
    before: Mapping[str, float] | None = None, baseline: pd.DataFrame | None = None,
) -> DriftReport:
    """Compare the live rows of one version with its reference, task by task.

    Args:
        reference: The version's answers to the test rows, with `score`.
        live: The live rows, of this version only.
        config: The limits.
        feedback: Columns id, time, is_right, is_random; None: there is none.
        before: Accuracy that the gate measured for the version before, by task.
        baseline: Earlier live rows that take the reference's place in the tests of drift. Accuracies are still
            compared with the reference.

    Returns:
        One entry for each task of the reference or of the live rows, in alphabetical order.
    """
    names = sorted({*reference["task"], *live["task"]})
    found = [
        _look(
            name, reference[reference["task"] == name], live[live["task"] == name], config, feedback,
            None if baseline is None else baseline[baseline["task"] == name],
        )
        for name in names
    ]  # fmt: skip
    num_tests = sum(each.num_tests for each in found)
    level = config.alpha / max(1, num_tests)
    decided = tuple(_decide(each, level, config, (before or {}).get(each.task)) for each in found)
    return DriftReport(tasks=decided, num_tests=num_tests, level=level)


def window(live: pd.DataFrame, num_rows: int) -> pd.DataFrame:
    """Return the newest rows. A client that repeats a request within the same minute counts once.

    Rows without a time keep their order, and all of them count.
    """
    if live["time"].notna().all():
        minutes = live["time"].astype(float) // 60
        live = live.assign(_minute=minutes).sort_values("time", kind="stable")
        live = live.drop_duplicates(["input_sha256", "_minute"]).drop(columns="_minute")
    return live.tail(num_rows)


def _look(
    name: str, reference: pd.DataFrame, logged: pd.DataFrame, config: MonitorConfig, feedback: pd.DataFrame | None,
    baseline: pd.DataFrame | None,
) -> TaskDrift:
    """Make the tests of one task. Whether they are alarms depends on the number of tests of all tasks."""
    is_rebased = baseline is not None and not baseline.empty
    compared = baseline if is_rebased and baseline is not None else reference
    live = window(logged, config.window_rows)
    measured = None
    if feedback is not None and not reference.empty:
        measured = measured_accuracy(reference, logged, feedback, config.window_rows)
    found = TaskDrift(
        task=name, status="no reference" if reference.empty else "too few rows", num_logged=len(logged),
        num_live=len(live), num_reference=len(compared), is_rebased=is_rebased, measured=measured,
    )
    if reference.empty or len(live) < config.min_rows:
        return found
    return replace(
        found, status="compared", tests=tuple(_tests(compared, live, config)),
        estimated=estimated_accuracy(reference, live), label_shares=_label_shares(compared, live),
        confidences=_histograms(compared["confidence"], live["confidence"]),
    )


def _tests(reference: pd.DataFrame, live: pd.DataFrame, config: MonitorConfig) -> list[DriftTest]:
    has_labels = bool(live["is_label"].notna().any() and reference["is_label"].notna().any())
    differences: dict[TestName, Difference | None] = {}
    if has_labels:
        differences["labels"] = two_samples.label_shares(reference["label"].dropna(), live["label"].dropna())
        differences["no label"] = two_samples.share_grew(
            int((reference["is_label"] == False).sum()), len(reference),  # noqa: E712
            int((live["is_label"] == False).sum()), len(live),  # noqa: E712
        )  # fmt: skip
    for name, column in DISTRIBUTIONS.items():
        if name == "length of answers" and has_labels:  # the label decides it
            continue
        pair = reference[column].dropna(), live[column].dropna()
        if all(len(values) for values in pair):
            differences[name] = two_samples.distributions(*pair)
    if "input" in reference and "input" in live:
        differences["texts"] = two_samples.texts([*reference["input"].dropna()], [*live["input"].dropna()])
    return [
        DriftTest(
            name=name, effect=each.effect, limit=_limit(name, config), p_value=each.p_value, low=each.low,
            high=each.high,
        )
        for name, each in differences.items() if each is not None
    ]  # fmt: skip


def _limit(name: TestName, config: MonitorConfig) -> float:
    return {"labels": config.min_psi, "texts": config.min_auc}.get(name, config.min_distance)


def _decide(found: TaskDrift, level: float, config: MonitorConfig, before: float | None) -> TaskDrift:
    """Mark the alarms: significant and large."""
    tests = tuple(
        replace(each, is_alarm=each.p_value < level and each.effect >= each.limit) for each in found.tests
    )
    estimated, measured = (
        None if each is None else replace(each, is_alarm=_has_dropped(each, level, config))
        for each in (found.estimated, found.measured)
    )
    alarms = [Alarm(kind="drift", reason=_reason(each, found.label_shares)) for each in tests if each.is_alarm]
    for word, accuracy in (("measured", measured), ("estimated", estimated)):
        if accuracy is not None and accuracy.is_alarm:
            alarms.append(Alarm(kind="quality", reason=_dropped(word, accuracy)))
            if before is not None and accuracy.is_below(before) and not _contradicts(measured, accuracy, before):
                alarms.append(Alarm(kind="decayed", reason=_decayed(word, accuracy, before)))
    return replace(
        found, tests=tests, estimated=estimated, measured=measured, before=before, alarms=tuple(alarms)
    )


def _has_dropped(accuracy: LiveAccuracy, level: float, config: MonitorConfig) -> bool:
    if accuracy.reference is None or accuracy.p_value is None or accuracy.drop_points is None:
        return False
    is_large = accuracy.drop_points >= config.max_live_drop_points
    return is_large and accuracy.p_value < level and accuracy.is_below(accuracy.reference)


def _contradicts(measured: LiveAccuracy | None, accuracy: LiveAccuracy, before: float) -> bool:
    """Whether feedback says that the version is not worse than the one before, whatever the estimate says."""
    return measured is not None and measured is not accuracy and measured.low >= before


def _reason(test: DriftTest, label_shares: Mapping[str, tuple[float, float]]) -> str:
    said = f"{test.name}: {test.unit} {test.effect:.2f}, limit {test.limit:g} (p = {test.p_value:.0e})"
    moved = sorted(label_shares.items(), key=lambda item: -abs(item[1][1] - item[1][0]))
    shown = [
        f"{label or 'no label'} {100 * before:.0f} % → {100 * now:.0f} %"
        for label, (before, now) in moved[:MAX_MOVED] if abs(now - before) >= MIN_MOVED
    ]
    return f"{said}; {', '.join(shown)}" if test.name in ("labels", "no label") and shown else said


def _dropped(word: str, accuracy: LiveAccuracy) -> str:
    assert accuracy.reference is not None
    return (
        f"accuracy is {word} at {_percent(accuracy)} in {accuracy.num_rows} live rows; the test rows have "
        f"{100 * accuracy.reference:.1f} %"
    )


def _decayed(word: str, accuracy: LiveAccuracy, before: float) -> str:
    return (
        f"accuracy is {word} at {_percent(accuracy)}, below the {100 * before:.1f} % that the gate measured for the "
        "version before"
    )


def _percent(accuracy: LiveAccuracy) -> str:
    return f"{100 * accuracy.accuracy:.1f} % ({100 * accuracy.low:.1f} to {100 * accuracy.high:.1f})"


def _label_shares(reference: pd.DataFrame, live: pd.DataFrame) -> dict[str, tuple[float, float]]:
    sides = [side.loc[side["is_label"].notna(), "label"].fillna("") for side in (reference, live)]
    if any(side.empty for side in sides):
        return {}
    before, now = (side.value_counts(normalize=True) for side in sides)
    labels = [*before.index, *(label for label in now.index if label not in before.index)]
    return {str(label): (float(before.get(label, 0.0)), float(now.get(label, 0.0))) for label in labels}


def _histograms(reference: pd.Series, live: pd.Series) -> tuple[tuple[float, float], ...]:
    sides = [side.dropna().astype(float) for side in (reference, live)]
    if any(side.empty for side in sides):
        return ()
    counts = [np.histogram(side, bins=NUM_BINS, range=(0.0, 1.0))[0] / len(side) for side in sides]
    return tuple((float(first), float(second)) for first, second in zip(*counts, strict=True))
