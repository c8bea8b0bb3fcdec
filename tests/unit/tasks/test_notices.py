"""Every notice can be sent, and is told of."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from prefect.server.utilities.user_templates import render_user_template_sync

from flows.server.automations import BODY, notifications
from infra.versions import LearnedArrival
from tasks.notices import EVENTS, Kind, Notice
from tests.stored_versions import version

PAGE = Path(__file__).parents[3] / "docs" / "notifications.md"


def test_every_kind_of_notice_has_an_event_an_automation_and_a_line_of_the_page() -> None:
    assert {*EVENTS} == {*get_args(Kind)}
    expected = {event for automation in notifications(None) for event in automation.trigger.expect}  # type: ignore[union-attr]
    assert {*EVENTS.values()} <= expected
    page = PAGE.read_text()
    assert not [event for event in EVENTS.values() if f"`{event}`" not in page]


def test_a_notice_about_a_consolidation_names_the_number_of_its_arrivals_and_no_task() -> None:
    learned = (LearnedArrival(task="bank", dataset_sha256="d"),) * 3
    together, alone = Notice.of(version(4, kind="consolidation", arrivals=learned)), Notice.of(version(4))
    assert [(notice.task, notice.arrivals) for notice in (together, alone)] == [(None, 3), ("bank", None)]
    told = [
        render_user_template_sync(BODY, {"event": {"payload": notice.model_dump(mode="json")}}).splitlines()[:2]
        for notice in (together, alone, Notice(lineage="l", error="It failed."))
    ]
    show = "deal version show 4 --report --lineage l"
    assert told == [
        ["Lineage l, consolidation of 3 arrivals", show],
        ["Lineage l, task bank", show],
        ["Lineage l", "It failed."],
    ]
