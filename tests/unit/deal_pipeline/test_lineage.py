"""What a lineage as a Python object reads from its environment, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from deal_pipeline import CommandError, Lineage
from deal_pipeline.lineage import KEY, _token

ROWS = [{"text": "My card is lost.", "label": "lost card"}, {"text": "I paid twice.", "label": None}]
ADAPTED = {
    "version": "1",
    "status": "promoted",
    "rejected": False,
    "reasons": [],
    "accuracies": {},
    "metrics": {},
    "message": "",
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The sections `task` of the specs of all commands. Each command learns its rows."""
    seen: list[Any] = []

    def run(arguments: Sequence[str], *_: object) -> Any:
        seen.append(json.loads(Path(arguments[1]).read_text())["task"])
        return ADAPTED

    monkeypatch.setattr("deal_pipeline.lineage.run_command", run)
    return seen


def test_a_list_of_rows_is_a_table(calls: list[Any], tmp_path: Path) -> None:
    with_gaps = [*ROWS, {"text": "Where is it?", "label": "lost card", "hint": {"from": ["a", 1]}}]
    Lineage(home=tmp_path).adapt(with_gaps, task="t", test_data=ROWS)
    for name, rows in (("data", with_gaps), ("test_data", ROWS)):
        place = Path(calls[0][name])
        assert place.parent == tmp_path / "tables" and place.suffix == ".jsonl"
        assert [json.loads(line) for line in place.read_text().splitlines()] == rows


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (None, "The data is None; give a file, an address, a list of rows as dicts"),
        (pd.Series(["a"]), "The data is of the type Series; give"),
        (np.array([["a", "b"]]), "The data is of the type ndarray; give"),
        (3, "The data is of the type int; give"),
        (b"rows.csv", "The data is of the type bytes; give"),
        ({"text": ["a"], "label": ["b"]}, "The data is a dict of text, label; give one split of it, or its rows as a"),
        (["a", "b"], "Row 1 of the data is of the type str; give a dict"),
        ([*ROWS, None], "Row 3 of the data is None; give a dict"),
        ([*ROWS, {"text": np.int64(3)}], "Row 3 of the data is no JSON: Object of type int64"),
        ([{("a", "b"): 1}], "Row 1 of the data is no JSON: keys must be str"),
        (pd.DataFrame({"text": [object()]}), "The table cannot be kept as Parquet"),
    ],
)
def test_data_that_are_no_rows_are_refused_in_one_sentence(data: Any, said: str, tmp_path: Path) -> None:
    lineage = Lineage(home=tmp_path)
    arguments = [{"data": data}, {"data": "a.csv", "test_data": data}]
    for given in arguments[: 1 if data is None else 2]:  # without test rows, a share of the rows judges
        with pytest.raises(CommandError, match=said) as refused:
            lineage.adapt(**given, task="t")
        assert refused.value.exit_code == 2
    assert not list(tmp_path.rglob("*.parquet")) and not list(tmp_path.rglob("*.jsonl"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"task": None}, "The argument task is None; give a name, or the section task of a spec as a dict"),
        ({"task": ["t"]}, "The argument task is of the type list; give a name"),
        ({"settings": [("train", {})]}, "The argument settings is of the type list; give a dict of a spec's sections"),
        ({"settings": "train: {}"}, "The argument settings is of the type str"),
        ({"settings": {"train": {"num_epochs": np.int64(3)}}}, "cannot be written as YAML: Object of type int64"),
        ({"settings": {"train": {1, 2}}}, "cannot be written as YAML: Object of type set"),
        ({"settings": {("train", "gate"): 1}}, "cannot be written as YAML: keys must be str"),
        ({"settings": {"task": {"name": "u"}}}, "The settings have a section task; give it as the argument task"),
        ({"task": {"name": "t", "labels": pd.Series(["a"])}}, "cannot be written as YAML: Object of type Series"),
    ],
)
def test_arguments_of_another_type_are_refused_in_one_sentence(
    calls: list[Any], arguments: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(CommandError, match=said) as refused:
        Lineage(home=tmp_path).adapt(ROWS, **{"task": "t", **arguments})
    assert refused.value.exit_code == 2 and not calls
    assert not list((tmp_path / "tables").glob("*")), "the table of a refused call is removed"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Lineage(None), "The argument name is None; give a text"),  # type: ignore[arg-type]
        (lambda: Lineage(home=3), "The argument home is of the type int; give the path of a folder"),  # type: ignore[arg-type]
        (lambda: Lineage(environment=["A"]), "The argument environment is of the type list; give"),  # type: ignore[arg-type]
        (lambda: Lineage(environment={"A": 1}), "The argument environment is of the type int; give"),  # type: ignore[dict-item]
        (lambda: Lineage("a\0b").evaluate(), "The command deal version evaluate cannot be started: embedded null byte"),
    ],
)
def test_a_lineage_of_another_type_is_refused(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(CommandError, match=said):
        make()


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (None, "The argument texts is None; give a text or a list of texts"),
        (pd.DataFrame({"text": ["a"]}), "The argument texts is of the type DataFrame"),
        ({"text": "a"}, "The argument texts is of the type dict"),
        (pd.Series(["a", float("nan")]), "Text 2 is of the type float; give a text"),
        (np.array([1, 2]), "Text 1 is of the type int64; give a text"),
    ],
)
def test_what_is_no_text_is_refused_before_the_model_is_loaded(texts: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=said):
        Lineage(home=tmp_path).predict(texts)


@pytest.mark.parametrize(("stages", "kept"), [(["ingest"], 0), (["ingest", "train"], 1)])
def test_a_table_stays_only_where_a_version_may_need_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stages: list[str], kept: int
) -> None:
    """A run that died after its training may still become a version, which a requeue learns again from the table."""

    def fail(_: object, __: object, ___: object, told: set[str]) -> None:
        told.update(stages)
        raise CommandError("it failed", 1)

    monkeypatch.setattr("deal_pipeline.lineage.run_command", fail)
    for data in (ROWS, pd.DataFrame(ROWS)):
        with pytest.raises(CommandError, match="it failed"):
            Lineage(home=tmp_path).adapt(data, task="t")
    assert len(list((tmp_path / "tables").iterdir())) == 2 * kept


def test_the_table_of_a_repeat_is_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("deal_pipeline.lineage.run_command", lambda *_: {**ADAPTED, "status": "repeat"})
    assert Lineage(home=tmp_path).adapt(ROWS, task="t").status == "repeat"
    assert not list((tmp_path / "tables").iterdir())


def test_a_home_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CommandError, match=r"cannot be written to .*tables.* \(Not a directory\); check the home"):
        Lineage(home=tmp_path / "file").adapt(ROWS, task="t")


def test_the_token_is_the_one_that_the_server_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY, raising=False)
    assert _token({}) == ""
    monkeypatch.setenv(KEY, "theirs\n")  # as a secret that was made from a file
    assert _token({}) == "theirs" and _token({KEY: " mine \n"}) == "mine"
