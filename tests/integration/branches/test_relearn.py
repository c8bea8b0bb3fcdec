"""`deal data delete --relearn`, on a base model of two layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infra.store.opening import open_store
from infra.versions import Versions
from tasks.adaptation.resume import read_findings
from tasks.lineage.record import read_record
from tasks.lineage.requests import add_labels, renew_tests
from tests.adapting import run
from tests.conftest import MakeOnce
from tests.integration.branches.conftest import TASKS, adapter, champion, delete, learn_tasks, small_task

pytestmark = pytest.mark.usefixtures("prefect_api", "without_mlflow")

CASES = [("deal", 50, "beds"), ("deal", 50, "taps"), ("deal", 0, "beds"), ("seq_lora", 0, "beds")]
CASES += [("seq_lora", 50, "beds"), ("replay", 50, "beds"), ("replay", 0, "beds")]


@pytest.mark.parametrize(
    ("strategy", "rows", "deleted"),
    [pytest.param(*case, marks=[pytest.mark.nightly] if case != CASES[0] else []) for case in CASES],
)
def test_the_result_is_that_of_a_lineage_that_never_saw_the_arrival(
    tiny_base: Path,
    home_made_once: MakeOnce,
    copy_to_home: Callable[[Path], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    strategy: str,
    rows: int,
    deleted: str,
) -> None:
    settings: dict[str, Any] = {"strategy": strategy, "rehearsal": {"rows": rows}}
    original = home_made_once(
        f"three-tasks-{strategy}-{rows}", lambda folder: learn_tasks(folder, tiny_base, **settings)
    )
    home = copy_to_home(original)
    before = adapter(champion())
    result = delete(deleted)
    assert result.status == "swapped" and result.champion == champion().version == str(3 + len(result.made))
    relearned = adapter(champion())
    assert relearned != before

    other = home.with_name("other")
    other.mkdir()
    monkeypatch.setenv("DEAL_HOME", str(other))
    for name in TASKS:
        if name != deleted:
            run(tiny_base, small_task(tmp_path, name), **settings)
    assert [version.version for version in Versions(open_store()).all("l")] == ["1", "2"]
    assert relearned == adapter(champion())


@pytest.mark.nightly
def test_labels_renewals_and_kept_rows_are_those_of_their_time(
    tiny_base: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No label comes before its time, and a file that is gone is learned from the rows that are kept of it."""
    keeps = {"data": {"retain_training_rows": True}}

    def learn(*, cars: bool) -> None:
        run(tiny_base, small_task(tmp_path, "taps"))
        add_labels(open_store(), "l", "taps", ["hot"])
        run(tiny_base, small_task(tmp_path, "taps", "-2"))
        if cars:
            run(tiny_base, small_task(tmp_path, "cars"))
        add_labels(open_store(), "l", "taps", ["icy"])
        run(tiny_base, small_task(tmp_path, "taps", "-3"), **keeps)
        add_labels(open_store(), "l", "taps", ["late"])
        renew_tests(open_store(), "l", "taps")
        assert run(tiny_base, small_task(tmp_path, "taps", "-4")).status == "promoted"

    learn(cars=True)
    add_labels(open_store(), "l", "taps", ["never"])
    (tmp_path / "taps-3.jsonl").unlink()
    learned = {
        version.version: read_findings(open_store(), version.adapter_uri).dataset
        for version in Versions(open_store()).all("l")
    }
    result = delete("cars")
    assert result.branch.arrivals == {"4": "taps", "5": "taps"}
    again = [
        read_findings(open_store(), version.adapter_uri).dataset for version in Versions(open_store()).all("l")[5:]
    ]
    assert [(dataset.new_labels, dataset.renews_tests) for dataset in again] == [(("icy",), False), (("late",), True)]
    assert again[0] == learned["4"].model_copy(update={"num_added": 0}), "its file is gone, and the rows are kept"
    assert result.status == "swapped" and champion().parent_version == "6"
    relearned, record = adapter(champion()), read_record(open_store(), champion())
    assert record.task("taps") and [part.name for part in record.slices] == ["taps.old-1"]

    other = home.with_name("other")
    other.mkdir()
    monkeypatch.setenv("DEAL_HOME", str(other))
    learn(cars=False)
    assert relearned == adapter(champion())
    assert record == read_record(open_store(), champion())
