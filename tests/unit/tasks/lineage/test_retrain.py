"""When a lineage is trained on what has landed: every setting of `retrain`, decided without a store and a clock."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from deal_core.errors import ConfigError
from tasks.lineage.retrain import RetrainPolicy, Waiting, WaitingFile, when_to_train
from tasks.lineage.settings import WatchedLineage
from tasks.spec import parse

SUNDAY = datetime(2026, 12, 6, 2, 0, tzinfo=UTC)
"""A Sunday at two."""
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
WEEKLY = {"when": "schedule", "cron": "0 2 * * 0", "min_rows": 200, "max_wait_days": 7}


def policy(**settings: Any) -> RetrainPolicy:
    return parse(RetrainPolicy, settings, "test")


def decide(settings: dict[str, Any], now: datetime, *files: tuple[datetime, int], spent: float = 0.0) -> Waiting:
    waiting = [WaitingFile(landed, num_rows) for landed, num_rows in files]
    found = when_to_train(policy(**settings), "bank", waiting, now=now, spent_hours=lambda: spent)
    assert found is not None
    return found


def test_nothing_waits_without_files() -> None:
    assert when_to_train(policy(), "bank", [], now=SUNDAY, spent_hours=lambda: 0.0) is None


def test_by_default_what_lands_is_due_at_once() -> None:
    assert decide({}, SUNDAY, (SUNDAY, 1)).is_due
    assert not policy().may_wait and not policy(skip_if_accuracy=0.9).may_wait
    assert all(policy(**each).may_wait for each in (WEEKLY, {"min_rows": 2}, {"budget_hours": 1.0}))


def test_rows_are_counted_over_the_files_of_a_task() -> None:
    monday = SUNDAY - 6 * DAY
    few = decide({"min_rows": 200}, SUNDAY, (monday, 150), (SUNDAY, 49))
    assert (few.is_due, few.num_files, few.num_rows, few.since, few.until) == (False, 2, 199, monday, None)
    assert "199 of 200 rows" in few.line() and "No time is set for this" in few.line()
    assert decide({"min_rows": 200}, SUNDAY, (monday, 150), (SUNDAY, 50)).is_due


def test_after_the_longest_wait_of_the_oldest_file_fewer_rows_are_enough() -> None:
    settings = {"min_rows": 200, "max_wait_days": 7}
    files = ((SUNDAY, 1), (SUNDAY + 6 * DAY, 1))
    early = decide(settings, SUNDAY + 7 * DAY - HOUR, *files)
    assert not early.is_due and early.until == SUNDAY + 7 * DAY
    assert decide(settings, SUNDAY + 7 * DAY, *files).is_due


def test_a_schedule_counts_what_had_landed_at_its_time() -> None:
    friday, monday = SUNDAY - 2 * DAY, SUNDAY + DAY
    before = decide(WEEKLY, SUNDAY - HOUR, (friday, 300))
    assert not before.is_due and before.until == SUNDAY
    assert "The rows are enough. Training starts by Sun 2026-12-06 02:00 UTC at the latest." in before.line()
    assert decide(WEEKLY, SUNDAY, (friday, 300)).is_due
    assert decide(WEEKLY, SUNDAY + 3 * HOUR, (friday, 300)).is_due, "a run that comes late still learns it"
    later = decide(WEEKLY, monday + HOUR, (friday, 100), (monday, 150))
    assert not later.is_due, "at the schedule's time there were too few rows"
    assert later.until == friday + 7 * DAY
    assert decide(WEEKLY, SUNDAY + HOUR, (SUNDAY + HOUR / 2, 300)).until == SUNDAY + 7 * DAY
    assert decide(WEEKLY, SUNDAY + 7 * DAY, (SUNDAY + HOUR, 300)).is_due


def test_too_few_rows_at_the_schedules_time_wait_for_the_longest_wait_and_no_longer() -> None:
    monday = SUNDAY - 6 * DAY
    few = decide(WEEKLY, SUNDAY + HOUR, (monday, 150))
    assert not few.is_due and few.until == monday + 7 * DAY
    assert "150 of 200 rows have landed; the next check is on Sun 2026-12-13 02:00 UTC" in few.line()
    assert decide(WEEKLY, monday + 7 * DAY, (monday, 150)).is_due
    without = {name: value for name, value in WEEKLY.items() if name != "max_wait_days"}
    assert decide(without, SUNDAY + 90 * DAY, (monday, 150)).until is None


def test_a_schedule_keeps_to_its_time_zone_and_misses_no_hour_that_the_clock_skips() -> None:
    settings = {"when": "schedule", "cron": "0 2 * * 0", "timezone": "Europe/Berlin"}
    assert decide(settings, SUNDAY - HOUR, (SUNDAY - DAY, 1)).is_due, "two in Berlin is one in UTC"
    assert not decide(settings, SUNDAY - 2 * HOUR, (SUNDAY - DAY, 1)).is_due
    spring = datetime(2026, 3, 29, 1, 0, tzinfo=UTC)  # Berlin's clocks go from two to three
    assert not decide(settings, spring - HOUR, (spring - DAY, 1)).is_due
    assert decide(settings, spring, (spring - DAY, 1)).is_due


def test_a_budget_counts_by_calendar_month_and_is_asked_last() -> None:
    settings = {"budget_hours": 20.0, "timezone": "Europe/Berlin"}
    assert decide(settings, SUNDAY, (SUNDAY, 1), spent=19.9).is_due
    over = decide(settings, SUNDAY, (SUNDAY, 1), spent=20.0)
    assert not over.is_due and "20.0 of the 20 training hours of this month are used" in over.line()
    assert over.until == datetime(2027, 1, 1, tzinfo=ZoneInfo("Europe/Berlin"))
    first, following = policy(**settings).month_of(datetime(2026, 11, 30, 23, 30, tzinfo=UTC))
    assert (first.month, following.month) == (12, 1), "it is December in Berlin"

    def never() -> float:
        raise AssertionError("asked for no reason")

    waits = policy(budget_hours=1.0, min_rows=5)
    found = when_to_train(waits, "bank", [WaitingFile(SUNDAY, 1)], now=SUNDAY, spent_hours=never)
    assert found is not None and not found.is_due


def test_what_a_person_asks_for_waits_for_nothing() -> None:
    waits = policy(**WEEKLY, budget_hours=1.0)
    file = WaitingFile(SUNDAY - HOUR, 1, is_asked_for=True)
    found = when_to_train(waits, "bank", [file], now=SUNDAY - HOUR, spent_hours=lambda: 99.0)
    assert found is not None and found.is_due and "A person has asked" in found.line()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"when": "schedule"}, "retrain.cron is missing"),
        ({"cron": "0 2 * * 0"}, "retrain.cron needs retrain.when: schedule"),
        ({"when": "schedule", "cron": "0 2 30 2 *"}, "retrain.cron.*no cron expression: Bad day-of-month"),
        ({"timezone": "../etc/passwd"}, "no time zone has this name"),
        ({"max_wait_days": 7}, "retrain.max_wait_days needs"),
        ({"budget_hours": 745}, "budget_hours.*at most 744"),
        ({"max_wait_days": 1e308, "min_rows": 2}, "max_wait_days.*at most 3650"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(WatchedLineage, {"retrain": settings}, "test")


def test_a_cron_expression_with_seconds_is_refused() -> None:
    with pytest.raises(ConfigError) as refused:
        parse(WatchedLineage, {"retrain": {"when": "schedule", "cron": "*/5 * * * * *"}}, "test")
    assert refused.value.code == "cron-fields"


def test_the_longest_settings_decide_for_what_landed_just_now() -> None:
    settings = {"when": "schedule", "cron": "0 2 29 2 *", "min_rows": 2**31 - 1, "max_wait_days": 3650}
    waiting = decide(settings, SUNDAY, (SUNDAY, 1), spent=0.0)
    assert not waiting.is_due and waiting.until == SUNDAY + 3650 * DAY and "2036" in waiting.line()
