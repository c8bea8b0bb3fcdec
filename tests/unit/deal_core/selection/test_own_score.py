"""Scores of other packages: found by their entry points, refused with a reason."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from datasets import Dataset

from deal_core.base_model.load import BaseModel
from deal_core.config import AdapterConfig, TrainConfig
from deal_core.data.schema import TaskSchema
from deal_core.errors import ConfigError
from deal_core.method_config import MethodConfig, SelectionConfig
from deal_core.selection import OWN, PLUGINS, score_class
from deal_core.selection.choose import ChosenRows, choose_rows
from deal_core.training.train import TrainingSetup

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

class Other(RowScore):
    name = "another"
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package with the documented example and with scores that cannot be used."""
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


def choose(score: str, folder: Path) -> ChosenRows:
    """Choose two of eight rows, of which each has a word more than the row before."""
    rows = Dataset.from_list([{"input": " ".join("abcdefgh"[: row + 1]), "output": "yes"} for row in range(8)])
    setup = TrainingSetup(
        task=TaskSchema(name="letters", instruction="Go on.", format="completion"),
        strategy="deal",
        adapter=AdapterConfig(),
        method=MethodConfig(selection=SelectionConfig(keep=2, score=score)),
        train=TrainConfig(),
    )
    return choose_rows(rows, setup, refuse, parent_folder=None, journal=folder / "selection.json")


def refuse() -> BaseModel:
    raise AssertionError("the base model was asked for")


def test_the_documented_example_is_a_score(installed: Path, tmp_path: Path) -> None:
    assert choose("variety", tmp_path).rows == (6, 7)
    assert list(PLUGINS.find())[: len(OWN)] == list(OWN) and score_class("random").__module__.startswith("deal_core.")


@pytest.mark.parametrize(
    ("name", "found"), [("short", r"3 finite numbers in the shape \(3,\)"), ("endless", r"0 .* \(8,\) for 8 rows")]
)
def test_a_score_without_a_finite_number_for_each_row_is_refused(
    installed: Path, tmp_path: Path, name: str, found: str
) -> None:
    with pytest.raises(ConfigError, match=f"The score '{name}' returned {found}"):
        choose(name, tmp_path)
    assert not (tmp_path / "selection.json").exists()
