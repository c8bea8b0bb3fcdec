"""A judge compares a version's free answers with the champion's: in the notes, and in the gate if it is asked."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deal_core.errors import ConfigError
from deal_core.evaluation.report import EvaluationReport
from infra.tracking.tracker import open_tracker
from tasks.adaptation.frozen_rows import read_answers
from tasks.adaptation.report import EVALUATION_FILE, read_page
from tasks.context import current_store
from tests.adapting import BANK, PASS, run
from tests.fake_judge import FakeJudge
from tests.integration.adaptation.test_flow_metrics import notes  # noqa: F401

pytestmark = pytest.mark.usefixtures("prefect_api", "home")
OTHERWISE: dict[str, Any] = {
    "max_steps": 25,
    "learning_rate": 0.05,
    "max_prompt_tokens": 192,
    "max_answer_tokens": 12,
    "checkpoint_steps": 0,
}
"""A training that changes every answer."""
JUDGED = {**PASS, "judge": "veto", "max_drop_points": 20}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeJudge]:
    with FakeJudge() as server:
        monkeypatch.setenv("DEAL_JUDGE_URL", server.url)
        monkeypatch.setenv("DEAL_JUDGE_MODEL", "j")
        yield server


def answers_of(run_key: str, task: str) -> list[str]:
    kept = read_answers(current_store(), f"adapters/l/{run_key[:16]}")
    assert kept is not None
    return list(kept.now[task].values())


@pytest.mark.nightly
def test_the_judge_rejects_a_version_and_its_failure_lets_it_pass_with_a_note(
    notes: dict[str, str],  # noqa: F811
    server: FakeJudge,
    tiny_base: Path,
    home: Path,
) -> None:
    first = run(tiny_base, notes, gate=JUDGED)
    assert first.status == "promoted" and not server.questions, "there was no champion to compare with"
    champions = set(answers_of(first.run_key, "notes"))

    server.decide = lambda first, second: "A" if first.strip() in champions else "B"
    rejected = run(tiny_base, BANK, gate=JUDGED, train=OTHERWISE)
    assert not champions & set(answers_of(rejected.run_key, "notes"))
    assert rejected.rejected and len(rejected.reasons) == 1
    assert rejected.reasons[0].startswith("notes: the judge j prefers the champion in 10 of 10 test rows and this ")
    assert len(server.questions) == 20, "each row in both orders; labels are not judged"
    assert "A thing" not in server.questions[0] and "is reported." in server.questions[0], "references are shown"
    assert "the judge j prefers this version in 0 of 10 test rows" in read_page(str(rejected.tracking_id))[1]
    judged = evaluation_of(rejected.tracking_id).judged["notes"]
    assert (judged.num_won, judged.num_lost, judged.num_missing, judged.drop.points) == (0, 10, 0, 100.0)

    shutil.rmtree(home / "judge")
    server.status = 500
    passed = run(tiny_base, BANK, gate=JUDGED, train=OTHERWISE, again=True)
    assert passed.status == "promoted"
    notes_of = [note for note in evaluation_of(passed.tracking_id).notes if "the judge" in note]
    assert len(notes_of) == 1, notes_of
    told = notes_of[0]
    assert told.startswith("notes: the judge j gave no verdict. 10 rows have no verdict: ")
    assert "answered 500" in told and len(server.questions) < 20 + 20


def evaluation_of(tracking_id: str | None) -> EvaluationReport:
    return EvaluationReport.from_json(open_tracker().run(str(tracking_id)).read_json(EVALUATION_FILE))


def test_a_judge_that_is_not_named_is_refused_before_anything_is_trained(
    notes: dict[str, str],  # noqa: F811
    tiny_base: Path,
) -> None:
    with pytest.raises(ConfigError, match=r"gate\.judge asks for a judge, and this machine knows none"):
        run(tiny_base, notes, gate={**PASS, "judge": "report"})
