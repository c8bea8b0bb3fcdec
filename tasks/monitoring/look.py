"""Look at the live traffic of a lineage's champion: compare, keep the figures, and announce what has changed."""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
from pydantic import BaseModel

from deal_core.errors import ConfigError, StoreError
from deal_core.judging_config import DriftLimits
from deal_core.monitoring.drift import compare, window
from deal_core.monitoring.report import DriftReport, LiveLook
from infra.lineage_state import OpenAlarm, read_state, update
from infra.predictions import read_feedback, read_predictions
from infra.store.base import ObjectStore
from infra.store.keys import baseline_folder, baseline_key
from infra.versions import Version
from tasks.lineage.history import find_version
from tasks.lineage.record import read_record
from tasks.lineage.settings import WatchedLineage, stored_lineage
from tasks.mlflow_mirror import write_look
from tasks.monitoring.rows import champion_since, read_frame, read_reference, rows_of_file, with_texts, write_frame
from tasks.monitoring.state import next_state
from tasks.notices import Notice, announce

BASELINE_COLUMNS = ["task", "label", "is_label", "confidence", "label_mass", "chars", "num_answer_chars"]
"""The columns of the live rows that are kept for later looks. They name no answer and no input."""


class MonitorResult(BaseModel, frozen=True):
    """A look at the live traffic of a lineage."""

    lineage: str
    version: str
    num_rows: int
    """Live rows of this version, repeated requests included."""
    num_faulty: int = 0
    """Rows of a file that cannot be read. They are left out."""
    drift: DriftReport | None = None
    """None: there was nothing to compare."""
    problem: str | None = None
    """Why nothing was compared, and what to do."""
    alarms: tuple[OpenAlarm, ...] = ()
    """All open alarms."""
    new_alarms: tuple[OpenAlarm, ...] = ()
    """Those that this look has announced."""


def look_at(store: ObjectStore, lineage: str, data: str | None = None, new_reference: bool = False) -> MonitorResult:
    """Compare the live traffic of a lineage's champion with its reference.

    `data` is a file of answers instead of the prediction log; see `rows_of_file`. Then nothing is announced, and the
    state stays as it was. With `new_reference`, the present live rows take the reference's place in the tests of drift,
    until another version is champion. Accuracies are still compared with the reference.

    Raises:
        RegistryError: The lineage has no champion.
        ConfigError: The file cannot be used, there are too few rows for a new reference, or `data` comes with
            `new_reference`.
    """
    if new_reference and data is not None:
        raise ConfigError(
            "--new-reference keeps rows of the prediction log for later looks, and --data compares a file once; give "
            "one of them."
        )
    info = find_version(store, lineage, None)
    record = read_record(store, info)
    if data is None:
        since = champion_since(store, lineage, info.version)
        live, num_faulty = read_predictions(store, lineage, version=info.version, since=since), 0
    else:
        live, num_faulty = rows_of_file(Path(data), record, info.version)
    result = MonitorResult(lineage=lineage, version=info.version, num_rows=len(live), num_faulty=num_faulty)
    reference = read_reference(store, info.adapter_uri)
    if reference is None:
        problem = f"Version {info.version} has no reference; write one with: deal version evaluate --lineage {lineage}."
        return result.model_copy(update={"problem": problem})
    if live.empty:
        problem = (
            f"The prediction log has no answer of version {info.version}. DEAL_LOG_PREDICTIONS switches it on for deal "
            "serve; answers of another server are compared with: deal monitor --data FILE."
        )
        return result.model_copy(update={"problem": problem})
    limits = (stored_lineage(store, lineage) or WatchedLineage()).monitor.limits
    if live["input"].notna().any():
        reference = with_texts(store, record, reference)
    if new_reference:
        _take_reference(store, info, live, limits)
    feedback = read_feedback(store, lineage, answers=live) if data is None else None
    report = compare(
        reference, live, limits, feedback=feedback, before=record.accuracies(1), baseline=_baseline(store, info)
    )
    result = result.model_copy(update={"drift": report})
    return result if data is not None else _note(store, info, result, report)


def _note(store: ObjectStore, info: Version, result: MonitorResult, report: DriftReport) -> MonitorResult:
    """Keep the look, announce new alarms, then write the state: after a crash the next look does it again."""
    now = datetime.now(UTC)
    state, new = next_state(read_state(store, info.lineage).monitor, info.version, report, now)
    live = LiveLook(lineage=info.lineage, version=info.version, looked=now, drift=report)
    write_look(store, info, live, _metrics(report), state.num_looks)
    for alarm in new:
        task = report.task(alarm.task)
        accuracy = task.measured or task.estimated
        accuracies = {task.task: accuracy.accuracy} if accuracy else {}
        notice = Notice.of(info, task=alarm.task, reasons=alarm.reasons, accuracies=accuracies)
        announce(alarm.kind, notice, once=alarm.identity(info.version))
    update(store, info.lineage, lambda other: other.model_copy(update={"monitor": state}))
    # rows that a new reference has kept for earlier versions
    own = baseline_key(info.lineage, info.version)
    for key in [info.key for info in store.list(baseline_folder(info.lineage)) if info.key != own]:
        store.delete(key)
    return result.model_copy(update={"alarms": state.alarms, "new_alarms": new})


def _metrics(report: DriftReport) -> dict[str, float | None]:
    """Return the figures of a report as metrics, `drift.TASK.NAME`."""
    metrics: dict[str, float | None] = {}
    for task in report.tasks:
        values: dict[str, float | None] = {
            "num_live": task.num_live,
            "num_logged": task.num_logged,
            "alarms": len(task.alarms),
            "estimated_accuracy": task.estimated.accuracy if task.estimated else None,
            "measured_accuracy": task.measured.accuracy if task.measured else None,
        }
        for test in task.tests:
            name = test.name.replace(" ", "_")
            values |= {name: test.effect, f"{name}_p": test.p_value}
        metrics |= {f"drift.{task.task}.{name}": value for name, value in values.items()}
    return metrics


def _take_reference(store: ObjectStore, info: Version, live: pd.DataFrame, limits: DriftLimits) -> None:
    """Keep the window of each task that has enough rows, as a look counts them. Other tasks keep their earlier rows."""
    windows = [window(rows, limits.window_rows) for _, rows in live.groupby("task")]
    enough = [rows for rows in windows if len(rows) >= limits.min_rows]
    if not enough:
        raise ConfigError(
            f"No task has {limits.min_rows} live rows of version {info.version} without repeats, which "
            "a look needs; wait for more traffic."
        )
    kept = pd.concat(enough)[BASELINE_COLUMNS]
    with suppress(StoreError):  # damaged rows are replaced as a whole
        if (before := _baseline(store, info)) is not None:
            kept = pd.concat([kept, before[~before["task"].isin(kept["task"])][BASELINE_COLUMNS]])
    write_frame(store, baseline_key(info.lineage, info.version), kept.sample(frac=1, random_state=0))


def _baseline(store: ObjectStore, info: Version) -> pd.DataFrame | None:
    key = baseline_key(info.lineage, info.version)
    if not store.exists(key):
        return None
    remedy = "Delete it: the test rows take its place, until the next deal monitor --new-reference."
    return read_frame(store, key, "the live rows to compare with", remedy)
