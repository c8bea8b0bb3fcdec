"""The next state of a lineage's monitoring: the last look, and the alarms that are open.

An alarm is announced once per version, task and kind. It stays open until a look that compared the task does not find
it. After that it can be announced again.
"""

from __future__ import annotations

from datetime import datetime

from deal_core.monitoring.report import ALARM_KINDS, DriftReport
from infra.lineage_state import MonitorState, OpenAlarm


def next_state(
    before: MonitorState | None, version: str, report: DriftReport, now: datetime
) -> tuple[MonitorState, tuple[OpenAlarm, ...]]:
    """Return the state after a look, and the alarms to announce. A new version begins without open alarms."""
    num_looks = (before.num_looks if before else 0) + 1
    kept = before.alarms if before is not None and before.version == version else ()
    alarms = {(alarm.task, alarm.kind): alarm for alarm in kept}  # those of tasks without rows stay
    new: list[OpenAlarm] = []
    told: dict[str, str] = {}
    for task in report.tasks:
        told[task.task] = f"{task.status} ({task.num_live})"
        if task.status == "compared":
            told[task.task] = f"{task.num_live} rows, " + ("alarms" if task.alarms else "no alarm")
        for kind in ALARM_KINDS:
            key = task.task, kind
            reasons = tuple(alarm.reason for alarm in task.alarms if alarm.kind == kind)
            if reasons and key in alarms:
                alarms[key] = alarms[key].model_copy(update={"reasons": reasons})
            elif reasons:
                alarms[key] = OpenAlarm(task=task.task, kind=kind, since=now, look=num_looks, reasons=reasons)
                new.append(alarms[key])
            elif task.status == "compared":
                alarms.pop(key, None)
    state = MonitorState(version=version, looked=now, num_looks=num_looks, alarms=tuple(alarms.values()), tasks=told)
    return state, tuple(new)
