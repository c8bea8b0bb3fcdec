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

from deal_core.judging_config import MonitorConfig
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


def compare(
    reference: pd.DataFrame,
    live: pd.DataFrame,
    config: MonitorConfig,
    *,
    feedback: pd.DataFrame | None = None,
    before: Mapping[str, float] | None = None,
    baseline: pd.DataFrame | None = None,
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
            name,
            reference[reference["task"] == name],
            live[live["task"] == name],
            config,
            feedback,
            None if baseline is None else baseline[baseline["task"] == name],
        )
        for name in names
    ]
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
    name: str,
    reference: pd.DataFrame,
    logged: pd.DataFrame,
    config: MonitorConfig,
    feedback: pd.DataFrame | None,
    baseline: pd.DataFrame | None,
) -> TaskDrift:
    """Make the tests of one task. Whether they are alarms depends on the number of tests of all tasks."""
    compared = reference if baseline is None or baseline.empty else baseline
    live = window(logged, config.window_rows)
    measured = None
    if feedback is not None and not reference.empty:
        measured = measured_accuracy(reference, logged, feedback, config.window_rows)
    found = TaskDrift(
        task=name,
        status="no reference" if reference.empty else "too few rows",
        num_logged=len(logged),
        num_live=len(live),
        num_reference=len(compared),
        is_rebased=compared is not reference,
        measured=measured,
    )
    if reference.empty or len(live) < config.min_rows:
        return found
    return replace(
        found,
        status="compared",
        tests=tuple(_tests(compared, live, config)),
        estimated=estimated_accuracy(reference, live),
        label_shares=_label_shares(compared, live),
        confidences=_histograms(compared["confidence"], live["confidence"]),
    )


def _tests(reference: pd.DataFrame, live: pd.DataFrame, config: MonitorConfig) -> list[DriftTest]:
    has_labels = bool(live["is_label"].notna().any() and reference["is_label"].notna().any())
    limits, differences = {"labels": config.min_psi, "texts": config.min_auc}, dict[TestName, Difference | None]()
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
            differences[name] = two_samples.distributions(*pair)
    if "input" in reference and "input" in live:
        differences["texts"] = two_samples.texts([*reference["input"].dropna()], [*live["input"].dropna()])
    return [
        DriftTest(name=name, limit=limits.get(name, config.min_distance), **vars(each))
        for name, each in differences.items()
        if each is not None
    ]


class Hits(NamedTuple):
    """Right answers among rows."""

    num_right: int
    num_rows: int


def hits(scores: pd.Series) -> Hits | None:
    """Count the right answers; None: there are no scores, or some are neither 0 nor 1."""
    known = scores.dropna()
    if known.empty or not known.isin([0.0, 1.0]).all():
        return None
    return Hits(int(known.sum()), len(known))


def estimated_accuracy(reference: pd.DataFrame, live: pd.DataFrame) -> LiveAccuracy | None:
    """Estimate the accuracy of live rows without labels, by Average Thresholded Confidence (ATC, arXiv 2201.04234).

    A threshold is chosen so that the share of reference rows with a lower confidence is the error rate there. The
    estimate is the reference's accuracy minus the drop in the share of rows at or above the threshold. Without ties
    this is the share itself, which is ATC.

    Limits: it sees only errors that lower the confidence. A model that is confidently wrong on new inputs, or labels
    whose meaning has changed, leave it unchanged. If all confidences fall alike, it falls further than the accuracy. No
    estimate of this kind is right for every shift.

    None: the scores are graded, no reference answer is right, or a confidence is missing on one side.
    """
    known = reference.dropna(subset=["confidence", "score"])
    right, confidences = hits(known["score"]), live["confidence"].dropna()
    if right is None or not right.num_right or confidences.empty:
        return None
    threshold = known["confidence"].sort_values().iloc[right.num_rows - right.num_right]
    above = Hits(int((known["confidence"] >= threshold).sum()), right.num_rows)
    live_above = Hits(int((confidences >= threshold).sum()), len(confidences))
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
    ends = (live.num_right / live.num_rows, *two_samples.wilson(live.num_right, live.num_rows))
    accuracy, low, high = (float(np.clip(end + shift, 0.0, 1.0)) for end in ends)
    if reference is None:
        return LiveAccuracy(accuracy=accuracy, low=low, high=high, num_rows=live.num_rows)
    wrong = reference.num_rows - reference.num_right
    grew = two_samples.share_grew(wrong, reference.num_rows, live.num_rows - live.num_right, live.num_rows)
    return LiveAccuracy(
        accuracy=accuracy,
        low=low,
        high=high,
        num_rows=live.num_rows,
        reference=reference.num_right / reference.num_rows + shift,
        drop_points=100 * grew.effect,
        p_value=grew.p_value,
    )


def _decide(found: TaskDrift, level: float, config: MonitorConfig, before: float | None) -> TaskDrift:
    """Mark the alarms: significant and large."""
    at_most = max(level, two_samples.SMALLEST)
    tests = tuple(replace(each, is_alarm=each.p_value <= at_most and each.effect >= each.limit) for each in found.tests)
    estimated, measured = (
        None if each is None else replace(each, is_alarm=_has_dropped(each, level, config))
        for each in (found.estimated, found.measured)
    )
    alarms = [Alarm(kind="drift", reason=_reason(each, found.label_shares)) for each in tests if each.is_alarm]
    for word, accuracy in (("measured", measured), ("estimated", estimated)):
        if accuracy is None or accuracy.reference is None or not accuracy.is_alarm:
            continue
        interval = f"{100 * accuracy.low:.1f} to {100 * accuracy.high:.1f}"
        said = f"accuracy is {word} at {100 * accuracy.accuracy:.1f} % ({interval})"
        versus_tests = f"in {accuracy.num_rows} live rows; the test rows have {100 * accuracy.reference:.1f} %"
        alarms.append(Alarm(kind="quality", reason=f"{said} {versus_tests}"))
        if before is not None and accuracy.is_below(before) and not _contradicts(measured, accuracy, before):
            versus_gate = f"below the {100 * before:.1f} % that the gate measured for the version before"
            alarms.append(Alarm(kind="decayed", reason=f"{said}, {versus_gate}"))
    return replace(found, tests=tests, estimated=estimated, measured=measured, before=before, alarms=tuple(alarms))


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
        for label, (before, now) in moved[:MAX_MOVED]
        if abs(now - before) >= MIN_MOVED
    ]
    return f"{said}; {', '.join(shown)}" if test.name in ("labels", "no label") and shown else said


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
