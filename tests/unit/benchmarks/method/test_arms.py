"""Ideas that are tried before they get a setting: versions that are kept, and steps that re-centre."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.method import arms, recentre
from tests.unit.benchmarks.conftest import LABELS

pytestmark = pytest.mark.nightly


def run(data: Path, base: Path, out: Path, *, arm: list[str], rows: int = 16, **options: Any) -> dict[str, Any]:
    arms.main(
        data=data,
        arm=arm,
        task=list(LABELS),
        strategy="seq_lora",
        rows=rows,
        max_test_rows=4,
        base=str(base),
        out=out,
        **options,
    )
    return dict(json.loads(out.read_text()))


def test_recentring_starts_from_the_kept_versions(
    data: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep, out, steps = tmp_path / "kept", tmp_path / "out.json", []
    learn = recentre.learn_rehearsal
    monkeypatch.setattr(recentre, "learn_rehearsal", lambda *given: (steps.append(given[4]), learn(*given)))
    run(data, tiny_base, out, arm=["plain"], seed=[0], keep=keep)
    (plain,) = keep.iterdir()
    made = (plain / "1" / "method.json").stat().st_mtime_ns
    found = run(data, tiny_base, out, arm=["plain", "recentred"], seed=[0], keep=keep, recentre_steps=3)
    assert (plain / "1" / "method.json").stat().st_mtime_ns == made, "it was not learned again"
    assert steps == [3] and found["recentre_steps"] == 3
    assert [trial["arm"] for trial in found["trials"]] == ["plain", "recentred"]
    first, second = (plain / name / "adapter_model.safetensors" for name in ("1", "1-recentred-3"))
    assert first.read_bytes() != second.read_bytes()
    run(data, tiny_base, out, arm=["plain"], seed=[0], keep=keep, rows=8)
    assert len(list(keep.iterdir())) == 2, "other settings have versions of their own"
