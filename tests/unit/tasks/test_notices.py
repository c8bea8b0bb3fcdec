"""Every notice can be sent, and is told of."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
from prefect.server.utilities.user_templates import render_user_template_sync

from deal_core.evaluation.accuracy_matrix import AccuracyMatrix
from deal_core.evaluation.report import EvaluationReport
from deal_pipeline.server.automations import BODY, notifications
from infra.versions import LearnedArrival
from tasks import notices
from tasks.notices import EVENTS, Kind, Notice
from tests.stored_versions import version

PAGE = Path(__file__).parents[3] / "docs" / "retrain.md"


def test_every_kind_of_notice_has_an_event_an_automation_and_a_line_of_the_page() -> None:
    assert {*EVENTS} < {kind for words in get_args(Kind) for kind in get_args(words)}
    expected = {event for automation in notifications(None) for event in automation.trigger.expect}  # type: ignore[union-attr]
    assert {*EVENTS.values()} <= expected
    page = PAGE.read_text()
    assert not [event for event in EVENTS.values() if f"`{event}`" not in page]


def test_a_notice_has_the_intervals_of_scores_of_few_rows_and_what_the_gate_could_not_have_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[Notice] = []
    monkeypatch.setattr(notices, "announce", lambda kind, notice, **_: told.append(notice))
    report = EvaluationReport(
        task="bank",
        accuracies={"bank": 0.85, "clinic": 0.5},
        parent_accuracies={},
        base_accuracy=0.0,
        parent_accuracy_new_task=None,
        num_rows={"bank": 20, "clinic": 400},
        matrix=AccuracyMatrix(),
    )
    notices.announce_version(version(1, accepted=True, unsure=("few rows",)), evaluation=report)
    (notice,) = told
    assert {name: tuple(round(end, 2) for end in ends) for name, ends in notice.intervals.items()} == {
        "bank": (0.64, 0.95)
    }
    assert notice.num_rows == {"bank": 20, "clinic": 400} and notice.reasons == ("few rows",)


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
