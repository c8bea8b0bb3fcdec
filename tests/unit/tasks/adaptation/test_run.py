"""Which version is named for rows that land again, and how a run's base model is loaded later."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from infra.store.opening import open_store
from tasks.adaptation.run import find_repeat, identify_base
from tasks.base import cached_base
from tasks.references import DatasetRef
from tests.stored_versions import move, put_version, version

NOW = DatasetRef(
    task="t", uri="d", sha256="split as of now", num_train=1, num_test=1, num_rejected=0, landed_sha256="x"
)


def test_rows_that_were_split_otherwise_are_a_repeat_of_what_was_left_behind(home: Path) -> None:
    store = open_store()
    for number, landed_sha256 in ((1, "first"), (2, "x"), (3, "other")):
        split = f"split as of then {number}"
        parent = 1 if number > 1 else None
        put_version(store, version(number, parent, accepted=True, dataset_sha256=split, landed_sha256=landed_sha256))
    move(store, "1")
    assert find_repeat(store, NOW, "l") is None, "a version that was overtaken before it was promoted is trained anew"
    move(store, "2")
    move(store, "1", "rolled back")
    found = find_repeat(store, NOW, "l")
    assert found is not None and (found.version, found.standing) == ("2", "left behind")
    assert find_repeat(store, NOW.model_copy(update={"landed_sha256": "y"}), "l") is None
    move(store, "2")
    assert find_repeat(store, NOW, "l") is None, "its test rows were forgotten, and the arrival brings new ones"


def test_a_base_model_is_lent_with_the_quantization_of_its_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gate, `predict` and `version evaluate` borrow it. To quantize a model takes a GPU."""
    loaded: list[str] = []

    def load(source: str, quantize: str) -> SimpleNamespace:
        loaded.append(quantize)
        return SimpleNamespace(name=source, sha256="0" * 64)

    monkeypatch.setattr("tasks.adaptation.run.load", load)
    monkeypatch.setattr("tasks.base.load", load)
    cached_base(identify_base("a model", "4bit"))
    assert loaded == ["4bit", "4bit"]
