"""Open alarms: announced once, kept while a look cannot tell, and announced again after they were gone."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from deal_core.monitoring.report import Alarm, AlarmKind, DriftReport, Status, TaskDrift
from infra.lineage_state import MonitorState, OpenAlarm
from tasks.monitoring.state import next_state

START = datetime(2026, 5, 4, 4, 0, tzinfo=UTC)


def report(**tasks: tuple[AlarmKind, ...] | Status) -> DriftReport:
    """A report with the alarms of each task, or with the reason why the task was not compared."""
    found = [
        TaskDrift(
            task=name,
            status="compared",
            num_logged=300,
            num_live=200,
            num_reference=100,
            alarms=tuple(Alarm(kind=kind, reason=f"{name} {kind}") for kind in value),
        )
        if isinstance(value, tuple)
        else TaskDrift(task=name, status=value, num_logged=3, num_live=2, num_reference=100)
        for name, value in tasks.items()
    ]
    return DriftReport(tasks=tuple(found), num_tests=1, level=0.01)


def looks(
    *reports: DriftReport, version: str = "3", before: MonitorState | None = None
) -> tuple[MonitorState, list[tuple[OpenAlarm, ...]]]:
    """The state after some looks, one a day, and what each announces."""
    announced = []
    for day, each in enumerate(reports):
        before, new = next_state(before, version, each, START + timedelta(days=day))
        announced.append(new)
    assert before is not None
    return before, announced


def test_an_alarm_is_announced_once_and_again_after_it_was_gone() -> None:
    state, announced = looks(*(report(bank=kinds) for kinds in (("drift",), ("drift",), (), ("drift",))))
    assert [len(new) for new in announced] == [1, 0, 0, 1]
    assert announced[0][0].reasons == ("bank drift",) and announced[0][0].look == 1 and announced[3][0].look == 4
    assert state.alarms == announced[3] and state.num_looks == 4


def test_an_alarm_after_a_lost_state_is_another_and_after_a_crash_the_same() -> None:
    first, crashed = (
        next_state(None, "3", report(bank=("drift",)), START + after)[1][0]
        for after in (timedelta(), timedelta(minutes=5))
    )
    assert first.identity("3") == crashed.identity("3")
    later = next_state(None, "3", report(bank=("drift",)), START + timedelta(days=9))[1][0]
    assert later.identity("3") != first.identity("3") != first.identity("4")


def test_each_kind_and_each_task_is_announced_by_itself() -> None:
    state, announced = looks(report(bank=("drift",), clinic=()), report(bank=("drift", "quality"), clinic=("drift",)))
    assert {(each.task, each.kind) for each in announced[1]} == {("bank", "quality"), ("clinic", "drift")}
    assert {(each.task, each.since) for each in state.alarms if each.kind == "drift"} == {
        ("bank", START),
        ("clinic", START + timedelta(days=1)),
    }


def test_a_look_that_cannot_tell_leaves_an_alarm_open() -> None:
    state, announced = looks(
        report(bank=("drift",)), report(bank="too few rows"), report(clinic=()), report(bank=("drift",))
    )
    assert [len(new) for new in announced] == [1, 0, 0, 0] and len(state.alarms) == 1


def test_a_new_version_begins_without_alarms() -> None:
    state, _ = looks(report(bank=("drift",)))
    after, announced = looks(report(bank=("drift",)), version="4", before=state)
    assert len(announced[0]) == 1 and after.version == "4" and after.num_looks == 2
    gone, _ = looks(report(bank="too few rows"), version="4", before=state)
    assert not gone.alarms
