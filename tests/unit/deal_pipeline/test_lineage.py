"""What a lineage as a Python object refuses, and what it keeps of a table."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from deal_core.errors import ConfigError, DealError, StoreError
from deal_core.evaluation.accuracy_matrix import AccuracyMatrix
from deal_pipeline import Home, Lineage, frame
from deal_pipeline.training import Adapt
from flows.adapt import AdaptResult
from infra.settings import HomeSettings, StoreSettings
from tasks.references import DatasetRef, VersionScores
from tasks.spec import AdaptSpec

ROWS = [{"text": "My card is lost.", "label": "lost card"}, {"text": "I paid twice.", "label": None}]
DATASET = DatasetRef(task="t", uri="u", sha256="s", num_train=1, num_test=1, num_rejected=0, landed_sha256="l")
ADAPTED = AdaptResult(
    status="promoted",
    rejected=False,
    message="",
    lineage="default",
    task="t",
    version="1",
    parent_version=None,
    reasons=(),
    dataset=DATASET,
    run_key="k",
)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[AdaptSpec]:
    """The specs of all trainings, none of which takes place. Each is told to have ended well."""
    specs: list[AdaptSpec] = []

    def train(self: Home, training: Adapt, *_: object, **__: object) -> AdaptResult:
        specs.append(Adapt.model_validate_json(training.model_dump_json()).spec)  # as a child gets it
        return ADAPTED

    monkeypatch.setattr(Home, "train", train)
    return specs


def test_a_list_of_rows_is_a_table(trained: list[AdaptSpec], tmp_path: Path) -> None:
    with_gaps = [*ROWS, {"text": "Where is it?", "label": "lost card", "hint": {"from": ["a", 1]}}]
    Lineage(home=tmp_path).adapt(with_gaps, task="t", test_data=ROWS)
    for file, rows in ((trained[0].task.data, with_gaps), (trained[0].task.test_data, ROWS)):
        assert isinstance(file, str) and Path(file).parent == tmp_path / "tables" and file.endswith(".jsonl")
        assert [json.loads(line) for line in Path(file).read_text().splitlines()] == rows


def test_settings_reach_the_training_whatever_characters_they_hold(trained: list[AdaptSpec], tmp_path: Path) -> None:
    labels = ["\U0001f600 good", "bad\u2028", "caf\u00e9"]
    Lineage("api", home=tmp_path).adapt("a.csv", task={"name": "mood", "labels": labels}, strategy="deal")
    (spec,) = trained
    assert spec.task.labels == tuple(labels) and (spec.lineage, spec.strategy) == ("api", "deal")


def test_relative_files_are_those_of_the_working_folder(
    trained: list[AdaptSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Lineage(home=tmp_path).adapt("a.csv", task={"name": "t", "test_data": Path("test.csv")})
    assert (trained[0].task.data, trained[0].task.test_data) == (str(tmp_path / "a.csv"), str(tmp_path / "test.csv"))


def test_a_lineage_s_file_is_below_the_arguments(trained: list[AdaptSpec], tmp_path: Path) -> None:
    settings = tmp_path / "store" / "lineages" / "api.yaml"
    settings.parent.mkdir(parents=True)
    settings.write_text("lineage: api\ntrain: {num_epochs: 3, max_steps: 7}\n")
    Lineage("api", home=tmp_path).adapt("a.csv", task="t", settings={"train": {"num_epochs": 2}})
    assert (trained[0].train.num_epochs, trained[0].train.max_steps) == (2, 7)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (None, "argument"),
        (pd.Series(["a"]), "argument"),
        (np.array([["a", "b"]]), "argument"),
        (3, "argument"),
        (b"rows.csv", "argument"),
        ({"text": ["a"], "label": ["b"]}, "argument"),
        (["a", "b"], "argument"),
        ([*ROWS, None], "argument"),
        ([*ROWS, {"text": np.int64(3)}], "table"),
        ([{("a", "b"): 1}], "table"),
        (pd.DataFrame({"text": [object()]}), "table"),
        (pd.DataFrame({"text": ["a", "b"], "label": [1, "x"]}), "table"),
        (pd.DataFrame([["a", "b"]], columns=["text", "text"]), "table"),
    ],
)
def test_data_that_are_no_rows_are_refused(trained: list[AdaptSpec], data: Any, code: str, tmp_path: Path) -> None:
    lineage = Lineage(home=tmp_path)
    arguments = [{"data": data}, {"data": "a.csv", "test_data": data}]
    for given in arguments[: 1 if data is None else 2]:  # without test rows, a share of the rows judges
        with pytest.raises(ConfigError) as refused:
            lineage.adapt(**given, task="t")
        assert refused.value.code == code
    assert not trained
    assert not list(tmp_path.rglob("*.parquet")) and not list(tmp_path.rglob("*.jsonl"))


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ({"task": None}, "argument"),
        ({"task": ["t"]}, "argument"),
        ({"settings": [("train", {})]}, "argument"),
        ({"settings": "train: {}"}, "argument"),
        ({"settings": {"task": {"name": "u"}}}, "argument"),
        ({"settings": {"train": {"num_epochs": object()}}}, "setting"),
        ({"settings": {"train": {1, 2}}}, "setting"),
        ({"settings": {("train", "gate"): 1}}, "argument"),
        ({"settings": {"train": {"no_such_setting": 1}}}, "setting"),
        ({"task": {"name": "t", "labels": 3}}, "setting"),
        ({"base": 3}, "setting"),
    ],
)
def test_arguments_of_another_type_are_refused(
    trained: list[AdaptSpec], arguments: dict[str, Any], code: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as refused:
        Lineage(home=tmp_path).adapt(ROWS, **{"task": "t", **arguments})
    assert refused.value.code == code and not trained
    assert not list((tmp_path / "tables").glob("*")), "the table of a refused call is removed"


@pytest.mark.parametrize(
    "make",
    [
        lambda: Lineage(None),  # type: ignore[arg-type]
        lambda: Lineage(home=3),  # type: ignore[arg-type]
        lambda: Lineage(environment=["A"]),  # type: ignore[arg-type]
        lambda: Lineage(environment={"A": 1}),  # type: ignore[dict-item]
        lambda: Home(store=3),  # type: ignore[arg-type]
    ],
)
def test_a_home_of_another_type_is_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(ConfigError) as refused:
        make()
    assert refused.value.code == "argument"


@pytest.mark.parametrize(
    "texts",
    [None, pd.DataFrame({"text": ["a"]}), {"text": "a"}, pd.Series(["a", float("nan")]), np.array([1, 2]), ["a", None]],
)
def test_what_is_no_text_is_refused_before_the_model_is_loaded(texts: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        Lineage(home=tmp_path).predict(texts)
    assert refused.value.code == "argument"


@pytest.mark.parametrize(("stages", "kept"), [(["ingest"], 0), (["ingest", "train"], 1)])
def test_a_table_stays_only_where_a_version_may_need_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stages: list[str], kept: int
) -> None:
    """A run that died after its training may still become a version, which a requeue learns again from the table."""

    def fail(self: Home, training: Adapt, *_: object, reporter: Any, **__: object) -> None:
        for stage in stages:
            reporter.stage_finished(stage, 1.0, "")
        raise DealError("it failed")

    monkeypatch.setattr(Home, "train", fail)
    for data in (ROWS, pd.DataFrame(ROWS)):
        with pytest.raises(DealError, match="it failed"):
            Lineage(home=tmp_path, show=None).adapt(data, task="t")
    assert len(list((tmp_path / "tables").iterdir())) == 2 * kept


def test_the_table_of_a_repeat_is_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Home, "train", lambda *_, **__: ADAPTED.model_copy(update={"status": "repeat"}))
    assert Lineage(home=tmp_path).adapt(ROWS, task="t").status == "repeat"
    assert not list((tmp_path / "tables").iterdir())


def test_a_home_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=str(tmp_path / "file" / "tables")):
        Lineage(home=tmp_path / "file").adapt(ROWS, task="t")


def test_a_home_leaves_the_environment_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEAL_HOME", str(tmp_path / "theirs"))
    monkeypatch.setenv("DEAL_CACHE_DIR", str(tmp_path / "cache"))
    before = dict(os.environ)
    elsewhere = (tmp_path / "elsewhere").as_uri()
    homes = Home(tmp_path / "mine"), Home(tmp_path / "other", store=elsewhere, environment={"DEAL_S3_REGION": "eu-1"})
    with homes[0].opened() as store:
        assert store.uri == (tmp_path / "mine" / "store").as_uri() and HomeSettings().cache_dir == tmp_path / "cache"
        with homes[1].opened() as other:
            assert other.uri == elsewhere and StoreSettings().s3_region == "eu-1"
        assert StoreSettings().s3_region is None
    assert HomeSettings().home == tmp_path / "theirs" and dict(os.environ) == before


def test_a_lineage_that_has_learned_nothing_has_no_history(tmp_path: Path) -> None:
    lineage = Lineage("none", home=tmp_path)
    assert (lineage.champion, lineage.held()) == (None, ())
    for look, code in ((lineage.history, "no-version"), (lineage.matrix, "version")):
        with pytest.raises(DealError) as refused:
            look()
        assert refused.value.code == code
    assert not list(tmp_path.iterdir()), "looking makes nothing"


def test_results_are_tables() -> None:
    matrix = AccuracyMatrix().with_row("a", {"a": 0.5}, base_accuracy=0.25, parent_accuracy=None)
    matrix = matrix.with_row("b", {"a": 0.25, "b": 1.0}, base_accuracy=0.0, parent_accuracy=None)
    table = frame(matrix)
    assert [*table.columns] == ["a", "b"] and [*table.index] == ["a", "b"] and table.index.name == "learned"
    assert table.loc["b", "b"] == 1.0 and np.isnan(table.loc["a", "b"])
    scores = frame(VersionScores(accuracies={"a": 0.5}, recorded={"a": 0.75}, num_rows={"a": 4}))
    assert scores.loc["a"].to_dict() == {"score": 0.5, "recorded": 0.75, "num_rows": 4.0}
    assert frame([DATASET]).loc[0, "task"] == "t" and frame([]).empty
