"""Look at the live traffic of a lineage's champion: compare, keep the figures, and announce what has changed."""

from __future__ import annotations

import logging
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
from pydantic import BaseModel

from deal_core.errors import ConfigError, StoreError
from deal_core.judging_config import MonitorConfig
from deal_core.monitoring.drift import compare, window
from deal_core.monitoring.report import DriftReport, LiveLook, TaskDrift
from infra.predictions import read_feedback
from infra.store.base import ObjectStore
from infra.store.keys import baseline_folder, baseline_key
from infra.versions import Version
from tasks.context import current_store
from tasks.lineage.history import find_version
from tasks.lineage.record import read_record
from tasks.lineage.settings import monitor_settings
from tasks.mlflow_mirror import write_look
from tasks.monitoring.rows import logged_rows, read_frame, read_reference, rows_of_file, with_texts, write_frame
from tasks.monitoring.state import OpenAlarm, next_state, read_monitor_state, write_monitor_state
from tasks.notices import Notice, announce

logger = logging.getLogger(__name__)

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


def look_at(lineage: str, data: str | None = None, rebase: bool = False) -> MonitorResult:
    """Compare the live traffic of a lineage's champion with its reference.

    `data` is a file of answers instead of the prediction log; see `rows_of_file`. Then nothing is announced, and the
    state stays as it was. With `rebase`, the present live rows take the reference's place in the tests of drift, until
    another version is champion. Accuracies are still compared with the reference.

    Raises:
        RegistryError: The lineage has no champion.
        ConfigError: The file cannot be used, there are too few rows for a rebase, or `data` comes with `rebase`.
    """
    if rebase and data is not None:
        raise ConfigError(
            "--rebase keeps rows of the prediction log for later looks, and --data compares a file once; give one of "
            "them."
        )
    store = current_store()
    info = find_version(store, lineage, None)
    record = read_record(store, info.adapter_uri)
    live, num_faulty = (
        (logged_rows(store, lineage, info.version), 0)
        if data is None
        else rows_of_file(Path(data), record, info.version)
    )
    found = MonitorResult(lineage=lineage, version=info.version, num_rows=len(live), num_faulty=num_faulty)
    reference = read_reference(store, info.adapter_uri)
    if reference is None:
        return found.model_copy(
            update={
                "problem": (
                    f"Version {info.version} has no reference; write one with: deal version evaluate --lineage {lineage}."
                )
            }
        )
    if live.empty:
        return found.model_copy(
            update={
                "problem": (
                    f"The prediction log has no answer of version {info.version}. DEAL_LOG_PREDICTIONS switches it on "
                    "for deal serve; answers of another server are compared with: deal monitor --data FILE."
                )
            }
        )
    config = monitor_settings(store, lineage)
    if live["input"].notna().any():
        reference = with_texts(store, record, reference)
    if rebase:
        _rebase(store, info, live, config)
    feedback = read_feedback(store, lineage, answers=live) if data is None else None
    report = compare(
        reference, live, config, feedback=feedback, before=record.accuracies(1), baseline=_baseline(store, info)
    )
    found = found.model_copy(update={"drift": report})
    return found if data is not None else _note(store, info, found, report)


def _note(store: ObjectStore, info: Version, found: MonitorResult, report: DriftReport) -> MonitorResult:
    """Keep the look, announce new alarms, then write the state: after a crash the next look does it again."""
    now = datetime.now(UTC)
    state, new = next_state(read_monitor_state(store, info.lineage), info.lineage, info.version, report, now)
    live = LiveLook(lineage=info.lineage, version=info.version, looked=state.looked, drift=report)
    write_look(store, info, live, metrics_of(report), state.num_looks)
    for alarm in new:
        notice = Notice.of(
            info,
            task=alarm.task,
            reasons=alarm.reasons,
            accuracies=_accuracies(report.task(alarm.task)),
        )
        announce(alarm.kind, notice, once=alarm.identity(info.version))
    write_monitor_state(store, state)
    _drop_old_baselines(store, info)
    return found.model_copy(update={"alarms": state.alarms, "new_alarms": new})


def metrics_of(report: DriftReport) -> dict[str, float | None]:
    """Return the figures of a report as metrics, `drift.TASK.NAME`."""
    found: dict[str, float | None] = {}
    for each in report.tasks:
        values: dict[str, float | None] = {
            "num_live": each.num_live,
            "num_logged": each.num_logged,
            "alarms": len(each.alarms),
            "estimated_accuracy": each.estimated.accuracy if each.estimated else None,
            "measured_accuracy": each.measured.accuracy if each.measured else None,
        }
        for test in each.tests:
            name = test.name.replace(" ", "_")
            values |= {name: test.effect, f"{name}_p": test.p_value}
        found |= {f"drift.{each.task}.{name}": value for name, value in values.items()}
    return found


def _accuracies(task: TaskDrift) -> dict[str, float]:
    """The measured accuracy, or else the estimated one."""
    found = task.measured or task.estimated
    return {task.task: found.accuracy} if found else {}


def _rebase(store: ObjectStore, info: Version, live: pd.DataFrame, config: MonitorConfig) -> None:
    """Keep the window of each task that has enough rows, as a look counts them. Other tasks keep their earlier rows."""
    windows = [window(rows, config.window_rows) for _, rows in live.groupby("task")]
    enough = [rows for rows in windows if len(rows) >= config.min_rows]
    if not enough:
        raise ConfigError(
            f"No task has {config.min_rows} live rows of version {info.version} without repeats, which "
            "monitor.min_rows asks for; wait for more traffic."
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
    remedy = "Delete it: the test rows take its place, until the next deal monitor --rebase."
    return read_frame(store, key, "the live rows to compare with", remedy)


def _drop_old_baselines(store: ObjectStore, info: Version) -> None:
    own = baseline_key(info.lineage, info.version)
    for each in [each.key for each in store.list(baseline_folder(info.lineage)) if each.key != own]:
        store.delete(each)
