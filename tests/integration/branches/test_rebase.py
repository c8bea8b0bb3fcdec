"""`deal lineage rebase`: the base model of two layers, and a merged export of it that was trained on other rows."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

import tasks.adaptation.gate
from benchmarks.tiny_base import build_tiny_base
from deal_core.errors import ConfigError, RegistryError
from flows.branch import give_up
from flows.rebase import plan_rebase, rebase
from infra.branches import Branches
from infra.promotions import PromotionLog
from infra.store.opening import open_store
from tasks.lineage.history import find_version
from tasks.lineage.promotion import promote_to, roll_back
from tasks.lineage.record import read_record
from tasks.lineage.settings import WatchedLineage, add_lineage, read_lineage
from tasks.predict import predict
from tests.adapting import run
from tests.integration.branches.conftest import champion, small_task

pytestmark = pytest.mark.usefixtures("prefect_api", "learned")


@pytest.fixture
def new_base(tmp_path: Path) -> str:
    """A base model of the same shape with other weights."""
    build_tiny_base(tmp_path / "new-base", seed=1)
    return str(tmp_path / "new-base")


def test_a_lineage_changes_its_base_model_and_goes_back(new_base: str, tiny_base: Path, tmp_path: Path) -> None:
    store, old = open_store(), champion()
    add_lineage(store, WatchedLineage(lineage="l", base_model=str(tiny_base)))
    with pytest.raises(ConfigError, match="already"):
        plan_rebase(store, "l", str(tiny_base))
    with pytest.raises(ConfigError, match="no address with a host"):
        asyncio.run(rebase("l", new_base, engines=("localhost:8000",), who="tester"))
    assert Branches(store).open("l") is None, "a wrong address shows before anything is learned"
    result = asyncio.run(rebase("l", new_base, who="tester"))
    assert result.status == "swapped", result.message
    assert [made.remakes for made in result.made] == ["1", "2", "3"]
    new = champion()
    assert new.version == "6" and new.base_sha256 != old.base_sha256
    assert [move.champion for move in PromotionLog(store).moves("l")] == ["1", "2", "3", "6"]
    assert result.before.keys() == result.accuracies.keys() == {"taps", "beds", "cars"}
    assert result.before == pytest.approx(read_record(store, old).accuracies())
    assert read_lineage(store, "l").base_model is None, "its champion says the base model"
    assert predict(store, "the red one", lineage="l", task="taps", version=None).base_model == new_base

    roll_back(store, "l", old.version, who="tester", why="a test")
    assert predict(store, "the red one", lineage="l", task="taps", version=None).base_model == str(tiny_base)
    again = run(tiny_base, small_task(tmp_path, "more"), base_model=None)
    assert find_version(store, "l", again.version).base_sha256 == old.base_sha256


@pytest.mark.nightly
def test_a_worse_result_is_not_swapped_in(new_base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def judged(*arguments: Any) -> Any:
        found = tasks.adaptation.gate.judge_against(*arguments)
        return found._replace(missing=("taps",))

    monkeypatch.setattr("flows.rebase.judge_against", judged)
    result = asyncio.run(rebase("l", new_base, who="tester"))
    assert result.status == "stopped" and "knows taps no longer" in result.message
    assert champion().version == "3"
    asyncio.run(give_up("l", "tester"))
    assert champion().version == "3"
    with pytest.raises(RegistryError, match="only with the whole branch"):
        promote_to(open_store(), "l", "6", who="tester", why="a test")
