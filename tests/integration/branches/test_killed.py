"""Another base model: its command is killed with kill -9 at one point after another, and the end is the same."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from infra.branches import Branches
from infra.promotions import PromotionLog
from infra.store.opening import open_store
from infra.versions import Versions
from tasks.serving.export import export_version
from tests.adapting import run
from tests.e2e.command import command, deal, environment
from tests.integration.branches.conftest import adapter, champion, small_task
from tests.integration.conftest import NO_MLFLOW

LONGEST_WAIT = 300.0

pytestmark = [pytest.mark.nightly(minutes=6), pytest.mark.usefixtures("prefect_api", "learned")]


def count(folder: str) -> Callable[[], int]:
    """What counts the objects of a folder of lineage `l`."""
    return lambda: len([info for info in open_store().list(f"{folder}/l") if info.key.endswith(".json")])


def adapters() -> dict[str, str]:
    """The digest of each version's adapter."""
    return {version.version: version.adapter_sha256 for version in Versions(open_store()).all("l")}


def kill_at(home: Path, words: tuple[str, ...], is_reached: Callable[[], bool]) -> None:
    """Start a command in a home, and kill it once it has reached a point."""
    log = home.parent / "killed.log"
    with log.open("ab") as stream:
        process = subprocess.Popen(
            command(home, *words),
            cwd=home.parent,
            env=environment(MLFLOW_TRACKING_URI=NO_MLFLOW),
            stdout=stream,
            stderr=stream,
        )
    began = time.monotonic()
    while not is_reached():
        assert process.poll() is None and time.monotonic() < began + LONGEST_WAIT, log.read_text()
        time.sleep(0.02)
    process.kill()
    process.wait()


def test_it_ends_as_if_it_had_not_been_killed(
    home: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tiny_base, small_task(tmp_path, "other"), lineage="other")
    export_version(open_store(), "other", "1", "merged", str(tmp_path / "new-base"))
    words = ("lineage", "rebase", "l", "--base", str(tmp_path / "new-base"), "--yes")
    runs = count("runs")
    points: list[tuple[Callable[[], int], int]] = [
        (count("branches"), 1),
        (runs, runs() + 1),  # a version is being learned
        (count("versions"), 4),
        (runs, runs() + 2),
        (count("versions"), 5),
        (count("promotions"), 4),
    ]
    untouched = home.with_name("untouched")
    shutil.copytree(home, untouched)

    for counted, number in points:
        kill_at(home, words, lambda counted=counted, number=number: counted() >= number)
    if Branches(open_store()).open("l") is not None:  # else the last kill came after the branch's end
        deal(home, *words, MLFLOW_TRACKING_URI=NO_MLFLOW)
    after, versions = adapter(champion()), adapters()
    moves = [move.champion for move in PromotionLog(open_store()).moves("l")]
    assert champion().version == moves[-1]
    assert Branches(open_store()).open("l") is None

    monkeypatch.setenv("DEAL_HOME", str(untouched))
    deal(untouched, *words, MLFLOW_TRACKING_URI=NO_MLFLOW)
    assert adapter(champion()) == after
    assert adapters() == versions, "none was learned twice"
    assert [move.champion for move in PromotionLog(open_store()).moves("l")] == moves
