"""A branch of a lineage: its command is killed with kill -9 at one point after another, and the end is the same."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infra.branches import Branches
from infra.promotions import PromotionLog
from infra.versions import Versions
from tasks.context import current_store
from tasks.serving.export import export_version
from tests.adapting import run
from tests.e2e.command import DEAL, ROOT
from tests.integration.branches.conftest import adapter, champion, small_task

LONGEST_WAIT = 300.0

pytestmark = [pytest.mark.nightly(minutes=6), pytest.mark.usefixtures("prefect_api", "learned")]


def count(folder: str, suffix: str = ".json") -> Callable[[], int]:
    """What counts the objects of a folder of lineage `l`."""
    return lambda: len([info for info in current_store().list(f"{folder}/l") if info.key.endswith(suffix)])


def start(home: Path, words: tuple[str, ...]) -> subprocess.Popen[bytes]:
    """Start a command in a home, with a Prefect API of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("DEAL_", "PREFECT_"))}
    with (home.parent / "killed.log").open("ab") as log:
        return subprocess.Popen(
            [*DEAL, *words, "--home", str(home), "--json"],
            cwd=home.parent,
            env={**kept, "PYTHONPATH": str(ROOT), "DEAL_CACHE_DIR": str(home.parent / "cache")},
            stdout=subprocess.PIPE,
            stderr=log,
        )


def run_to_the_end(home: Path, words: tuple[str, ...]) -> dict[str, Any]:
    process = start(home, words)
    printed = process.communicate()[0]
    assert process.returncode == 0, (home.parent / "killed.log").read_text()
    result: dict[str, Any] = json.loads(printed)
    return result


@pytest.mark.parametrize("kind", ["relearn", "rebase"])
def test_it_ends_as_if_it_had_not_been_killed(
    kind: str, home: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "relearn":
        taps = next(version for version in Versions(current_store()).all("l") if version.task == "taps")
        words: tuple[str, ...] = ("data", "delete", taps.dataset_sha256, "--relearn", "--lineage", "l", "--yes")
    else:
        run(tiny_base, small_task(tmp_path, "other"), lineage="other")
        export_version("other", "1", "merged", str(tmp_path / "new-base"))
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
    if kind == "relearn":
        points.append((count("versions", ".removed.json"), 1))
    untouched = home.with_name("untouched")
    shutil.copytree(home, untouched)

    for counted, number in points:
        process, began = start(home, words), time.monotonic()
        while counted() < number:
            assert process.poll() is None, (home.parent / "killed.log").read_text()
            assert time.monotonic() < began + LONGEST_WAIT
            time.sleep(0.02)
        process.kill()
        process.wait()
    result = run_to_the_end(home, words)
    after, numbers = adapter(champion()), [version.version for version in Versions(current_store()).all("l")]
    moves = [move.champion for move in PromotionLog(current_store()).moves("l")]
    assert result["champion"] == champion().version == moves[-1]
    assert Branches(current_store()).open("l") is None

    monkeypatch.setenv("DEAL_HOME", str(untouched))
    whole = run_to_the_end(untouched, words)
    assert adapter(champion()) == after
    assert [version.version for version in Versions(current_store()).all("l")] == numbers, "none was learned twice"
    assert [move.champion for move in PromotionLog(current_store()).moves("l")] == moves
    assert [made["adapter_sha256"] for made in result["made"]] == [made["adapter_sha256"] for made in whole["made"]]
