"""Scores of other packages: found by their entry points, checked by the conformance test, refused with a reason."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deal_core.errors import ConfigError
from deal_core.selection import OWN, PLUGINS, score_class
from deal_core.selection.conformance import check_score

EXAMPLE = Path(__file__).parents[4] / "docs" / "own_score.py"
BROKEN = """
import torch
from deal_core.selection.score import RowScore

class Short(RowScore):
    name = "short"
    def score(self, candidates):
        return torch.zeros(3)

class Endless(RowScore):
    name = "endless"
    def score(self, candidates):
        return torch.full((len(candidates.rows),), float("inf"))

class Dice(RowScore):
    name = "dice"
    def score(self, candidates):
        return torch.rand(len(candidates.rows))

class Other(RowScore):
    name = "another"
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package with the documented example and with scores that break a promise each."""
    folder = tmp_path / "site"
    metadata = folder / "own_score-1.0.dist-info"
    metadata.mkdir(parents=True)
    shutil.copy(EXAMPLE, folder)
    (folder / "broken_scores.py").write_text(BROKEN)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: own-score\nVersion: 1.0\n")
    lines = [f"{name.lower()} = broken_scores:{name}" for name in ("Short", "Endless", "Dice", "Other")]
    lines += ["variety = own_score:Variety", "gone = no_such_module:Gone", "random = own_score:Variety"]
    (metadata / "entry_points.txt").write_text("\n".join(["[deal_pipeline.scores]", *lines]))
    monkeypatch.syspath_prepend(folder)
    yield folder
    for name in ("own_score", "broken_scores"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", OWN)
def test_this_projects_scores_keep_the_promises(name: str) -> None:
    check_score(name)


def test_the_documented_example_is_a_score(installed: Path) -> None:
    check_score("variety")
    assert list(PLUGINS.find())[: len(OWN)] == list(OWN) and score_class("random").__module__.startswith("deal_core.")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("short", "give a number per row"),
        ("endless", "not finite"),
        ("dice", "gave other numbers"),
    ],
)
def test_a_broken_promise_is_named(installed: Path, name: str, problem: str) -> None:
    with pytest.raises(AssertionError, match=problem):
        check_score(name)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("other", "no subclass of RowScore with the name 'other'"),
        ("gone", "cannot be imported"),
        ("nowhere", "give random, .*variety"),
    ],
)
def test_a_score_that_cannot_be_used_is_refused(installed: Path, name: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        score_class(name)
