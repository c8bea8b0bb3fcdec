"""Every notice can be sent, and is told of."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from flows.server.automations import notifications
from tasks.notices import EVENTS, Kind

PAGE = Path(__file__).parents[3] / "docs" / "notifications.md"


def test_every_kind_of_notice_has_an_event_an_automation_and_a_line_of_the_page() -> None:
    assert {*EVENTS} == {*get_args(Kind)}
    expected = {event for automation in notifications(None) for event in automation.trigger.expect}  # type: ignore[union-attr]
    assert {*EVENTS.values()} <= expected
    page = PAGE.read_text()
    assert not [event for event in EVENTS.values() if f"`{event}`" not in page]
