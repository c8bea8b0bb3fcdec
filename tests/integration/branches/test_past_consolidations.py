"""A branch does not repeat a consolidation: the arrivals that it had learned together are learned one by one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.tiny_base import build_tiny_base
from flows.consolidate import consolidate
from flows.rebase import rebase
from infra.store.opening import open_store
from infra.versions import Versions
from tests.adapting import run
from tests.conftest import MakeOnce
from tests.integration.branches.conftest import adapter, champion, delete, small_task
from tests.integration.conftest import NO_MLFLOW

pytestmark = [pytest.mark.usefixtures("prefect_api", "without_mlflow"), pytest.mark.nightly(minutes=2)]


@pytest.fixture(scope="session")
def consolidated_between(tiny_base: Path, home_made_once: MakeOnce) -> Path:
    """A home whose lineage `l` has learned taps and beds, consolidated them as version 3, and then learned cars."""

    def learn(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MLFLOW_TRACKING_URI", NO_MLFLOW)
            for name in ("taps", "beds"):
                assert run(tiny_base, small_task(folder, name)).status == "promoted"
            assert asyncio.run(consolidate("l")).status == "promoted"
            assert run(tiny_base, small_task(folder, "cars")).parent_version == "3"

    return home_made_once("consolidated-between", learn)


@pytest.fixture
def home_of_story(consolidated_between: Path, copy_to_home: Callable[[Path], Path]) -> Path:
    """A copy of `consolidated_between`."""
    return copy_to_home(consolidated_between)


def test_relearning_gives_what_a_lineage_without_the_consolidation_has(
    home_of_story: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = delete("beds")
    assert [*result.branch.arrivals] == ["4"] and result.branch.root == "1"
    assert (result.status, result.champion, champion().parent_version) == ("swapped", "5", "1")
    assert result.attestation is not None
    assert result.attestation.removed == ("2", "3", "4"), "the consolidation has seen the rows too"
    relearned = adapter(champion())

    other = home_of_story.with_name("other")
    other.mkdir()
    monkeypatch.setenv("DEAL_HOME", str(other))
    for name in ("taps", "cars"):
        run(tiny_base, small_task(tmp_path, name))
    assert relearned == adapter(champion())


@pytest.mark.usefixtures("home_of_story")
def test_another_base_model_learns_each_arrival_by_itself(tmp_path: Path) -> None:
    new_base = tmp_path / "new-base"
    build_tiny_base(new_base, seed=1)
    result = asyncio.run(rebase("l", str(new_base), who="tester"))
    assert result.status == "swapped", result.message
    assert [(made.version, made.remakes) for made in result.made] == [("5", "1"), ("6", "2"), ("7", "4")]
    made = [version for version in Versions(open_store()).all("l") if version.branch is not None]
    assert [(version.kind, version.parent_version) for version in made] == [
        ("adaptation", None),
        ("adaptation", "5"),
        ("adaptation", "6"),
    ]
