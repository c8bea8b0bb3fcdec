"""Free answers through the adapt flow: scored by their task's metric, judged, stored, shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deal_core.evaluation.metrics import MODULES_VARIABLE
from deal_pipeline.cli.check import show_validation
from deal_pipeline.cli.console import show_adaptation
from infra.store.opening import open_store
from tasks.lineage.frozen_rows import read_answers
from tasks.validate import spec_to_check, validate
from tests.adapting import BANK, FAIL, page_of, record_of, run

pytestmark = pytest.mark.usefixtures("prefect_api", "home", "without_mlflow")


def is_dots(answer: str, expected: str) -> float:
    """A metric that looks at the reference alone."""
    del answer
    return 0.5 if expected == "…" else 0.0


@pytest.fixture
def notes(tmp_path: Path) -> dict[str, str]:
    """A task whose answers are short sentences."""
    path = tmp_path / "notes.jsonl"
    things = ("lost card", "late parcel", "low iron", "broken bone", "customs hold")
    rows = [
        {
            "prompt": f"Message {number} about a {thing}.",
            "completion": f"A {thing}, number {number}, is reported.",
            "split": "test" if number % 3 == 0 else "train",
        }
        for number, thing in enumerate(things * 6)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"name": "notes", "data": str(path)}


def test_free_answers_are_judged_by_rouge_l_and_labels_by_exact_match(notes: dict[str, str], tiny_base: Path) -> None:
    first, second = run(tiny_base, notes), run(tiny_base, BANK)
    assert first.metrics == {"notes": "rouge_l"} and second.metrics == {"notes": "rouge_l", "bank": "exact"}
    record = record_of(second)
    assert [known.schema.metric for known in record.tasks] == ["rouge_l", "exact"]
    report, page = page_of(second)
    assert "Scored otherwise than by exact match: notes by ROUGE-L." in page
    (changed,) = (each for each in report.changed if each.task == "notes")
    assert changed.metric == "rouge_l" and changed.num_rows == 10
    shown = "\n".join(map(str, show_adaptation(second)))
    assert "notes by ROUGE-L" in shown


def test_the_likelihood_of_the_references_needs_no_answers(notes: dict[str, str], tiny_base: Path) -> None:
    result = run(tiny_base, {**notes, "metric": "loss"})
    kept = read_answers(open_store(), f"adapters/l/{result.run_key[:16]}")
    assert kept is not None
    shares = [float(answer) for answer in kept.now["notes"].values()]
    assert len(shares) == 10 and all(0 < share < 1 for share in shares)
    assert result.accuracies["notes"] == pytest.approx(sum(shares) / 10, abs=1e-6)


def test_an_answer_may_be_any_of_several_and_a_file_is_told_how_many_rows_have_them(
    notes: dict[str, str], tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MODULES_VARIABLE, __name__)
    rows = [json.loads(line) for line in Path(notes["data"]).read_text().splitlines()]
    rows = [{**row, "completion": [row["completion"], "…"]} for row in rows]
    Path(notes["data"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    checked = validate(open_store(), *spec_to_check(open_store(), notes["data"], task="notes"))
    assert checked.num_several == len(rows) and checked.example is not None
    assert checked.example.answer.endswith("is reported.")
    assert f"{len(rows)} rows have several right answers" in "\n".join(map(str, show_validation(checked)))
    result = run(tiny_base, {**notes, "metric": f"{__name__}:is_dots"}, gate=FAIL)
    assert result.accuracies["notes"] == 0.5, "the reference after the first counts"
    assert result.rejected and "is_dots" in result.reasons[0], "a failed check names the metric"
