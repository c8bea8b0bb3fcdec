"""The year of `make year` on a base model that knows nothing: every command of the story does its part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks.tiny_base import NO_LIMITS, build_tiny_base
from benchmarks.year import YEAR, app

pytestmark = [pytest.mark.e2e, pytest.mark.nightly(minutes=8)]


def test_a_year_ends_with_all_that_is_left_learned_together_and_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    base, folder, out = tmp_path / "base", tmp_path / "year", tmp_path / "year.json"
    build_tiny_base(base)
    settings = [f"gate.{name}={json.dumps(value)}" for name, value in {**NO_LIMITS, "arrival": "warn"}.items()]
    settings += ["train.max_steps=1", "train.checkpoint_steps=0"]
    words = ["run", "--base", str(base), "--folder", str(folder), "--out", str(out)]
    words += [word for setting in settings for word in ("--set", setting)]

    def live() -> list[dict[str, Any]]:
        done = CliRunner().invoke(app, words)
        log = folder / "deal.log"
        assert done.exit_code == 0, done.output + (log.read_text() if log.is_file() else "")
        return list(json.loads(out.read_text())["steps"])

    steps = live()
    assert [step["month"] for step in steps] == [step.month for step in YEAR]
    champions = {step["event"] or step["month"]: step["champion"] for step in steps}
    assert champions["rolled back"] == champions["September's rows deleted"] != champions["November"]
    versions = {
        path.parent.name: json.loads(path.read_text()) for path in folder.glob("home/store/adapters/*/*/findings.json")
    }
    september = next(step["dataset"] for step in steps if step["month"] == "September")
    assert september not in {version["dataset"]["sha256"] for version in versions.values()}, "its adapter is gone"
    assert {*steps[-1]["accuracies"]} == {"transit", "water", "library", "waste", "housing"}

    (folder / "steps.json").write_text(json.dumps(steps[:-1]))  # as if stopped in its last command
    assert live()[-1]["champion"] == steps[-1]["champion"]
