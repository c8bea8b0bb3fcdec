"""The benchmark of monitoring: its first step on the tiny base, its second on made-up answers with known shifts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from benchmarks import monitoring
from benchmarks.monitoring import TYPOS, USUAL, measure
from tests.adapting import BANK
from tests.monitored import logged_rows

NUM_ROWS = 400


def answers() -> pd.DataFrame:
    """Usual rows, rows that the model is unsure of, and rows with other answers and no right one."""
    parts = {
        USUAL: logged_rows(NUM_ROWS, 0),
        TYPOS: logged_rows(NUM_ROWS, 1, sureness=(3.0, 3.0)),
        "texts of sport": logged_rows(NUM_ROWS, 2, shares={"loan": 0.9, "fraud": 0.1}, score=np.nan),
    }
    return pd.concat(
        [
            rows.assign(
                condition=name, expected=rows["label"], id=[f"bank/{name}/{number}" for number in range(NUM_ROWS)]
            )
            for name, rows in parts.items()
        ],
        ignore_index=True,
    )


@pytest.mark.nightly
def test_false_alarms_power_and_estimates_of_known_shifts() -> None:
    found = measure(answers(), num_looks=60, num_draws=10, num_text_draws=0, windows=(100, 300))["tasks"]["bank"]
    assert found["false_alarms"]["alarms"] <= 0.05 and found["false_alarms"]["rows_of_a_half"] == 200
    power = {(line["condition"], line["window"]): line for line in found["power"]}
    assert power["texts of sport", 300]["drift"] == 1.0 and not power["texts of sport", 300]["with_replacement"]
    assert power["texts of sport", 300]["tests"]["labels"] == 1.0
    assert power["one label is gone", 300]["drift"] == 1.0 and power["one label is gone", 300]["with_replacement"]
    assert power[TYPOS, 300]["quality"] > 0.8 > power[USUAL, 100]["alarms"]
    atc = {line["condition"]: line for line in found["atc"]}
    assert set(atc) == {USUAL, TYPOS, "one label is gone"}, "without a right answer there is no truth"
    for condition, true in ((USUAL, 0.75), (TYPOS, 0.5)):
        assert atc[condition]["true"] == pytest.approx(true, abs=0.06)
    assert atc[USUAL]["mean_error_points"] < 8
    assert atc[TYPOS]["estimated"] < atc[USUAL]["estimated"] - 0.2
    # the model is unsure of every row here, which the estimate takes for more errors than there are
    assert atc[TYPOS]["mean_error_points"] == pytest.approx(100 * (atc[TYPOS]["true"] - atc[TYPOS]["estimated"]), abs=1)


def test_a_version_answers_once_and_the_figures_come_from_its_file(
    three_versions: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitoring, "FOREIGN", {"bank": ("clinic",)})
    rows = [json.loads(line) for line in Path(BANK["test_data"]).read_text().splitlines()]
    for name in ("bank", "clinic"):
        (tmp_path / f"{name}.test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = next(
        path.parent
        for path in (three_versions / "store" / "adapters").rglob("deal.json")
        if "clinic" in path.read_text()
    )
    kept, out = tmp_path / "answers.parquet", tmp_path / "figures.json"
    runner, options = CliRunner(), ["--looks", "5", "--draws", "2", "--text-draws", "0", "--out", str(out)]
    import typer

    app = typer.Typer()
    app.command()(monitoring.main)
    done = runner.invoke(
        app, ["--answers", str(kept), "--version", str(folder), "--data", str(tmp_path), "--tasks", "bank", *options]
    )
    assert done.exit_code == 0, done.output
    found = pd.read_parquet(kept)
    assert found.groupby("condition").size().to_dict() == {USUAL: 36, TYPOS: 36, "texts of clinic": 36}
    assert found["confidence"].between(0, 1).all() and set(found["score"]) <= {0.0, 1.0}
    first = out.read_bytes()
    assert runner.invoke(app, ["--answers", str(kept), *options]).exit_code == 0
    assert out.read_bytes() == first
