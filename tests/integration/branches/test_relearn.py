"""`deal data delete --relearn`, on a base model of two layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from infra.versions import Versions
from tasks.context import current_store
from tests.integration.branches.conftest import adapter, champion, delete, small_task
from tests.adapting import run

pytestmark = pytest.mark.usefixtures("prefect_api", "without_mlflow")

CASES = [("deal", 50, "beds"), ("deal", 0, "beds"), ("seq_lora", 0, "beds"), ("seq_lora", 50, "beds")]
CASES += [("replay", 50, "beds"), ("replay", 0, "beds"), ("deal", 50, "taps")]


@pytest.mark.parametrize(
    ("strategy", "rows", "deleted"),
    [pytest.param(*case, marks=[pytest.mark.nightly] if case != CASES[0] else []) for case in CASES],
)
def test_the_result_is_that_of_a_lineage_that_never_saw_the_arrival(
    tiny_base: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str, rows: int, deleted: str
) -> None:
    tasks = [small_task(tmp_path, name) for name in ("taps", "beds", "cars")]
    settings: dict[str, Any] = {"strategy": strategy, "rehearsal": {"rows": rows}}
    for task in tasks:
        assert run(tiny_base, task, **settings).status == "promoted"
    before = adapter(champion())
    result = delete(deleted)
    assert result.status == "swapped" and result.champion == champion().version == str(3 + len(result.made))
    relearned = adapter(champion())
    assert relearned != before

    other = home.with_name("other")
    other.mkdir()
    monkeypatch.setenv("DEAL_HOME", str(other))
    for task in tasks:
        if task["name"] != deleted:
            run(tiny_base, task, **settings)
    assert champion().version == "2" and Versions(current_store()).all("l")[-1].version == "2"
    assert relearned == adapter(champion())
