"""The state of a lineage's monitoring: the last look, and the alarms that are open (`monitor/LINEAGE.json`).

An alarm is announced once per version, task and kind. It stays open until a look that compared the task does not find
it. After that it can be announced again.
"""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel

from deal_core.monitoring.report import ALARM_KINDS, AlarmKind, DriftReport
from infra.store.base import ObjectStore
from infra.store.keys import monitor_key
from infra.store.stored import Stored, read_stored, write_stored


class OpenAlarm(BaseModel, frozen=True, extra="forbid"):
    """An alarm that was announced and is not over."""

    task: str
    kind: AlarmKind
    since: datetime
    """Time of the look that found it."""
    look: int
    """Number of that look."""
    reasons: tuple[str, ...]
    """Of the last look that found it."""

    def identity(self, version: str) -> str:
        """Return what tells the alarm from others of its lineage and kind.

        The day is part of it, since the numbers of the looks begin anew after a damaged state was deleted. The time is
        not, so that a look that is repeated after a crash announces the same alarm.
        """
        return f"{version} {self.task} {self.look} {self.since:%Y-%m-%d}"


class MonitorState(Stored):
    """The last look at a lineage, and what it left open."""

    lineage: str
    version: str
    looked: datetime
    num_looks: int
    """Looks at the lineage so far, at all its versions."""
    tasks: dict[str, str]
    """What the look did with each task, in words."""
    alarms: tuple[OpenAlarm, ...] = ()

    def line(self) -> str:
        """Return the state in one line."""
        parts = [f"{alarm.task}: {alarm.kind} since {alarm.since:%Y-%m-%d %H:%M}" for alarm in self.alarms]
        alarmed = {alarm.task for alarm in self.alarms}
        parts += [f"{task}: {outcome}" for task, outcome in self.tasks.items() if task not in alarmed]
        return f"version {self.version}, {self.looked:%Y-%m-%d %H:%M} UTC: {'; '.join(parts) or 'no rows'}"


def read_monitor_state(store: ObjectStore, lineage: str) -> MonitorState | None:
    """Read the state of a lineage; None: nobody has looked yet; StoreError: it is damaged."""
    what = f"the state of the monitor of '{lineage}'"
    remedy = "Delete it: the next look writes a new one, and announces its alarms again."
    return read_stored(store, monitor_key(lineage), MonitorState, what=what, remedy=remedy)


def write_monitor_state(store: ObjectStore, state: MonitorState) -> None:
    """Write the state of a lineage."""
    write_stored(store, monitor_key(state.lineage), state)


def next_state(
    before: MonitorState | None, lineage: str, version: str, report: DriftReport, now: datetime
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
    state = MonitorState(
        lineage=lineage, version=version, looked=now, num_looks=num_looks, alarms=tuple(alarms.values()), tasks=told
    )
    return state, tuple(new)
