"""What the options of data-efficient training cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import selection


def test_every_option_is_timed_as_often_as_asked(
    data: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried, out, measure = [], tmp_path / "seconds.json", selection._seconds

    def record(base: Any, rows: Any, setup: Any, *folders: Path) -> tuple[float, float]:
        tried.append((setup.method, len(rows), setup.train.max_steps))
        return measure(base, rows, setup, *folders)

    monkeypatch.setattr(selection, "_seconds", record)
    monkeypatch.setattr(selection, "STEPS", 2)
    selection.options(data=data, rows=30, repeats=2, base=str(tiny_base), out=out)
    found = json.loads(out.read_text())
    assert sorted(found["options"]) == sorted(selection.OPTIONS) and (found["n"], found["rows"]) == (2, 30)
    assert all(tried.count((option, 30, 2)) >= 2 for option in selection.OPTIONS.values())
    assert len(tried) == 2 * len(selection.OPTIONS)
    assert all(seconds["step"] > 0 for seconds in found["options"].values())
