"""Compare the live traffic of a version with its reference: the version's answers to the frozen test rows.

The frames have the columns of `deal_core.monitoring.predictions`; the reference has `score` too, each row's score by
the task's metric. Each task is compared by itself. Rows of other versions must not be among the live rows.
An alarm reads: labels: PSI 0.61, limit 0.2 (p = 2e-14); fee dispute 21 % → 58 %
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd

from deal_core.evaluation.estimate import above_threshold
from deal_core.evaluation.interval import wilson_interval
from deal_core.judging_config import DriftLimits
from deal_core.monitoring import two_samples
from deal_core.monitoring.report import NUM_BINS, Alarm, DriftReport, DriftTest, LiveAccuracy, TaskDrift, TestName
from deal_core.monitoring.two_samples import Difference

MIN_MOVED = 0.05
"""Change of a label's share that a reason mentions."""
MAX_MOVED = 3
"""Labels that a reason mentions."""

DISTRIBUTIONS: dict[TestName, str] = {
    "confidence": "confidence",
    "label mass": "label_mass",
    "length of inputs": "chars",
    "length of answers": "num_answer_chars",
}
"""A test of two distributions → the column that it compares."""
PRECISION = 0.02
"""A difference of two probabilities that means nothing: an engine may compute in fp32 what the gate computed in bf16,
and a logit near 16 then differs by up to 0.06."""


def compare(
    reference: pd.DataFrame,
    live: pd.DataFrame,
    limits: DriftLimits,
    *,
    feedback: pd.DataFrame | None = None,
    before: Mapping[str, float] | None = None,
    baseline: pd.DataFrame | None = None,
) -> DriftReport:
    """Compare the live rows of one version with its reference, task by task.

    Args:
        reference: The version's answers to the test rows, with `score`.
        live: The live rows, of this version only.
        limits: When a difference counts.
        feedback: Columns id, time, is_right, is_random; None: there is none.
        before: Accuracy that the gate measured for the version before, by task.
        baseline: Earlier live rows that take the reference's place in the tests of drift. Accuracies are still
            compared with the reference.

    Returns:
        One entry for each task of the reference or of the live rows, in alphabetical order.
    """
    tasks = [
        _test_task(
            name,
            reference[reference["task"] == name],
            live[live["task"] == name],
            limits,
            feedback,
            None if baseline is None else baseline[baseline["task"] == name],
        )
        for name in sorted({*reference["task"], *live["task"]})
    ]
    # whether a test raises an alarm depends on the number of tests of all tasks
    num_tests = sum(task.num_tests for task in tasks)
    level = limits.alpha / max(1, num_tests)
    decided = tuple(_with_alarms(task, level, limits, (before or {}).get(task.task)) for task in tasks)
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


def _test_task(
    name: str,
    reference: pd.DataFrame,
    logged: pd.DataFrame,
    limits: DriftLimits,
    feedback: pd.DataFrame | None,
    baseline: pd.DataFrame | None,
) -> TaskDrift:
    compared = reference if baseline is None or baseline.empty else baseline
    live = window(logged, limits.window_rows)
    measured = None
    if feedback is not None and not reference.empty:
        measured = measured_accuracy(reference, logged, feedback, limits.window_rows)
    drift = TaskDrift(
        task=name,
        status="no reference" if reference.empty else "too few rows",
        num_logged=len(logged),
        num_live=len(live),
        num_reference=len(compared),
        is_of_live_rows=compared is not reference,
        measured=measured,
    )
    if reference.empty or len(live) < limits.min_rows:
        return drift
    return replace(
        drift,
        status="compared",
        tests=tuple(_tests(compared, live, limits)),
        estimated=estimated_accuracy(reference, live),
        label_shares=_label_shares(compared, live),
        confidences=_histograms(compared["confidence"], live["confidence"]),
    )


def _tests(reference: pd.DataFrame, live: pd.DataFrame, limits: DriftLimits) -> list[DriftTest]:
    has_labels = bool(live["is_label"].notna().any() and reference["is_label"].notna().any())
    differences = dict[TestName, Difference | None]()
    smallest = {"labels": limits.min_psi, "texts": limits.min_auc}
    if has_labels:
        differences["labels"] = two_samples.label_shares(reference["label"].dropna(), live["label"].dropna())
        differences["no label"] = two_samples.share_grew(
            int(reference["is_label"].eq(False).sum()),  # of an unknown kind it is None: no label is missing there
            len(reference),
            int(live["is_label"].eq(False).sum()),
            len(live),
        )
    for name, column in DISTRIBUTIONS.items():
        if name == "length of answers" and has_labels:  # the label decides it
            continue
        pair = reference[column].dropna(), live[column].dropna()
        if all(len(values) for values in pair):
            tolerance = PRECISION if name in ("confidence", "label mass") else 0.0
            differences[name] = two_samples.distributions(*pair, tolerance=tolerance)
    if "input" in reference and "input" in live:
        differences["texts"] = two_samples.texts([*reference["input"].dropna()], [*live["input"].dropna()])
    return [
        DriftTest(name=name, limit=smallest.get(name, limits.min_distance), **vars(difference))
        for name, difference in differences.items()
        if difference is not None
    ]


class Hits(NamedTuple):
    """Right answers among rows."""

    num_right: int
    num_rows: int


def hits(scores: pd.Series) -> Hits | None:
    """Count the right answers; None: there are no scores, or some are neither 0 nor 1."""
    scores = scores.dropna()
    if scores.empty or not scores.isin([0.0, 1.0]).all():
        return None
    return Hits(int(scores.sum()), len(scores))


def estimated_accuracy(reference: pd.DataFrame, live: pd.DataFrame) -> LiveAccuracy | None:
    """Estimate the accuracy of live rows without labels from their confidences, see `above_threshold`.

    None: the scores are graded, no reference answer is right, or a confidence is missing on one side.
    """
    reference = reference.dropna(subset=["confidence", "score"])
    right, confidences = hits(reference["score"]), live["confidence"].dropna()
    if right is None or not right.num_right or confidences.empty:
        return None
    counts = above_threshold(reference["confidence"].to_list(), right.num_right, confidences.to_list())
    above, live_above = Hits(counts.num_reference, right.num_rows), Hits(counts.num_live, len(confidences))
    shift = right.num_right / right.num_rows - above.num_right / above.num_rows
    return _against(live_above, above, shift)


def measured_accuracy(
    reference: pd.DataFrame, live: pd.DataFrame, feedback: pd.DataFrame, num_rows: int
) -> LiveAccuracy | None:
    """Measure the accuracy of live rows by feedback on rows that were chosen at random.

    Other feedback does not count: people report errors more often than right answers. An answer's newest feedback
    counts, and the newest `num_rows` answers with feedback. None: there is no such feedback.
    """
    chosen = feedback[feedback["is_random"].fillna(False).astype(bool) & feedback["is_right"].notna()]
    newest = chosen.sort_values("time", kind="stable").drop_duplicates("id", keep="last")
    judged = newest.merge(live[["id"]].drop_duplicates(), on="id").tail(num_rows)
    if judged.empty:
        return None
    return _against(Hits(int(judged["is_right"].astype(bool).sum()), len(judged)), hits(reference["score"]), 0.0)


def _against(live: Hits, reference: Hits | None, shift: float) -> LiveAccuracy:
    """Compare two shares; `shift` is added to both, and to the ends of the interval."""
    ends = (live.num_right / live.num_rows, *wilson_interval(live.num_right / live.num_rows, live.num_rows))
    accuracy, low, high = (float(np.clip(end + shift, 0.0, 1.0)) for end in ends)
    measured = LiveAccuracy(accuracy=accuracy, low=low, high=high, num_rows=live.num_rows)
    if reference is None:
        return measured
    wrong = reference.num_rows - reference.num_right
    grew = two_samples.share_grew(wrong, reference.num_rows, live.num_rows - live.num_right, live.num_rows)
    share = reference.num_right / reference.num_rows + shift
    return replace(measured, reference=share, drop_points=100 * grew.effect, p_value=grew.p_value)


def _with_alarms(drift: TaskDrift, level: float, limits: DriftLimits, before: float | None) -> TaskDrift:
    """Mark what is significant and large. `before` is the accuracy of the version before, by the gate."""
    at_most = max(level, two_samples.SMALLEST)
    tests = tuple(replace(test, is_alarm=test.p_value <= at_most and test.effect >= test.limit) for test in drift.tests)
    alarms = [Alarm(kind="drift", reason=_reason(test, drift.label_shares)) for test in tests if test.is_alarm]
    measured, estimated = (_judged(accuracy, level, limits) for accuracy in (drift.measured, drift.estimated))
    for word, accuracy in (("measured", measured), ("estimated", estimated)):
        if accuracy is None or not accuracy.is_alarm:
            continue
        assert accuracy.reference is not None, "an alarm compares with the reference"
        interval = f"{100 * accuracy.low:.1f} to {100 * accuracy.high:.1f}"
        figure = f"accuracy is {word} at {100 * accuracy.accuracy:.1f} % ({interval})"
        versus_tests = f"in {accuracy.num_rows} live rows; the test rows have {100 * accuracy.reference:.1f} %"
        alarms.append(Alarm(kind="quality", reason=f"{figure} {versus_tests}"))
        if before is None or not accuracy.is_below(before):
            continue
        # feedback may say that the version is not worse than the one before, whatever the estimate says
        if accuracy is measured or measured is None or measured.low < before:
            versus_gate = f"below the {100 * before:.1f} % that the gate measured for the version before"
            alarms.append(Alarm(kind="decayed", reason=f"{figure}, {versus_gate}"))
    return replace(drift, tests=tests, estimated=estimated, measured=measured, before=before, alarms=tuple(alarms))


def _judged(accuracy: LiveAccuracy | None, level: float, limits: DriftLimits) -> LiveAccuracy | None:
    if accuracy is None or accuracy.reference is None:
        return accuracy
    assert accuracy.p_value is not None and accuracy.drop_points is not None, "they come with the reference"
    is_large = accuracy.drop_points >= limits.max_live_drop_points and accuracy.is_below(accuracy.reference)
    return replace(accuracy, is_alarm=is_large and accuracy.p_value < level)


def _reason(test: DriftTest, label_shares: Mapping[str, tuple[float, float]]) -> str:
    figures = f"{test.name}: {test.unit} {test.effect:.2f}, limit {test.limit:g} (p = {test.p_value:.0e})"
    moved = sorted(label_shares.items(), key=lambda item: -abs(item[1][1] - item[1][0]))
    shown = [
        f"{label or 'no label'} {100 * before:.0f} % → {100 * now:.0f} %"
        for label, (before, now) in moved[:MAX_MOVED]
        if abs(now - before) >= MIN_MOVED
    ]
    return f"{figures}; {', '.join(shown)}" if test.name in ("labels", "no label") and shown else figures


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
