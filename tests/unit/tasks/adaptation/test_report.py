"""The page that Prefect shows of a run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from deal_core.config import DataConfig
from infra.report.page import verdict_of
from infra.store.opening import open_store
from tasks.adaptation.ingest import ingest
from tasks.adaptation.report import _quality, artifact_key, markdown_of, problem_of, thin
from tasks.spec import TaskSpec
from tests.report_sample import sample_evaluation, sample_report, sample_versions


def test_the_page_in_prefect_says_verdict_scores_and_rows_and_quotes_none() -> None:
    report, version = sample_report(), sample_versions()[-1]
    page = markdown_of(version, report, sample_evaluation())
    assert page.startswith(f"# {verdict_of(version)}\n")
    changed = report.changed[0]
    assert f"Test rows of {changed.task}: {changed.num_gained} gained, {changed.num_lost} lost." in page
    assert changed.lost[0].text and changed.lost[0].text not in page


def test_no_two_lineages_share_a_page() -> None:
    assert artifact_key("quiet") == "adapt-quiet"
    keys = {artifact_key(name) for name in ("support-eu", "support_eu", "Support-EU", "support.eu")}
    assert len(keys) == 4 and all(re.fullmatch("[a-z0-9-]+", key) for key in keys)


def test_thinning_keeps_both_ends() -> None:
    losses = [(step, float(step)) for step in range(1000)]
    kept = thin(losses, 10)
    assert len(kept) == 10 and (kept[0], kept[-1]) == (losses[0], losses[-1]) and kept == sorted(kept)
    assert thin(losses[:10], 10) == losses[:10]


def test_a_bad_row_says_why_with_and_without_its_texts() -> None:
    entry = {"reason": "malformed line", "value": "not JSON: Jane", "why": "not JSON"}
    assert problem_of(entry, include_texts=True) == "malformed line: not JSON: Jane"
    assert problem_of(entry, include_texts=False) == "malformed line: not JSON"
    assert problem_of({"reason": "malformed line", "value": "Jane"}, include_texts=False) == "malformed line"


@pytest.mark.parametrize(("is_kept", "is_shown"), [(True, True), (True, False), (False, True), (False, False)])
def test_contradictions_are_told_with_their_texts_only_where_texts_may_be(
    home: Path, tmp_path: Path, is_kept: bool, is_shown: bool
) -> None:
    rows = [{"text": f"text {number}", "label": "lost" if number % 2 else "late"} for number in range(60)]
    rows += [{"text": "Jane Doe called", "label": label} for label in ("lost", "late", "yes, please")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arrival = TaskSpec(name="calls", data=str(tmp_path / "rows.jsonl"))
    dataset = ingest(open_store(), arrival, DataConfig(include_texts=is_kept), None, "l")
    several, separated = _quality(open_store(), dataset, is_shown).warnings
    assert several.startswith("Texts with several labels: 1 (")
    assert ("'Jane Doe called': 'late' and 'lost' and 'yes, please'" in several) == (is_kept and is_shown)
    assert ("Jane" in several, "please" in separated) == (is_kept and is_shown, is_shown)
    assert len(dataset.warnings) == 2 and not any("Jane" in told or "please" in told for told in dataset.warnings)
