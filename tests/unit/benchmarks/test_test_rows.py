"""The benchmark of the intervals of small test sets, on made-up answers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from typer.testing import CliRunner

from benchmarks.output import read
from benchmarks.test_rows import NUM_UNUSED, SIZES, app, outcomes

GOOD, POOR = 0.8, 0.3


def chain(*shares: float) -> dict[str, object]:
    """Answers of the base model and of versions that are right in so many of the cases."""
    generator = np.random.default_rng(5)
    right = generator.integers(0, 4, NUM_UNUSED + max(SIZES))
    answers = [np.where(generator.random(len(right)) < share, right, (right + 1) % 4).tolist() for share in shares]
    return {"right": right.tolist(), "answers": answers}


def test_nineteen_of_twenty_intervals_hold_the_score_and_the_gate_promotes_what_it_would_promote() -> None:
    found = outcomes(chain(POOR, GOOD, POOR), 200, np.random.default_rng(0))
    assert len(found) == 200 * 2 * len(SIZES)
    for num_test in SIZES:
        assert np.mean([each.holds for each in found if each.num_test == num_test]) > 0.9
    assert np.mean([each.is_promoted for each in found if each.version == 1]) > 0.9
    assert np.mean([each.is_promoted for each in found if each.version == 2]) < 0.02, "it lost what was learned"


def test_the_table_counts_all_versions_and_promoted_ones(tmp_path: Path) -> None:
    (tmp_path / "answers").mkdir()
    (tmp_path / "answers" / "made-up-0.json").write_text(json.dumps(chain(POOR, GOOD)))
    options = ["--folder", str(tmp_path / "answers"), "--draws", "20", "--out", str(tmp_path / "table.json")]
    shown = CliRunner().invoke(app, ["table", *options])
    assert shown.exit_code == 0, shown.output
    sizes = read(tmp_path / "table.json")["sizes"]
    assert [line["num_test"] for line in sizes] == list(SIZES)
    assert all(80 <= line["held"] <= 100 and line["promoted"] >= 80 for line in sizes)
