"""Which version is named for rows that land again."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from infra.store.local import open_store
from infra.tracking.facts import VersionInfo
from infra.version_log import Ledger
from tasks.adaptation.promote import note_learned
from tasks.adaptation.run import find_repeat
from tasks.references import DatasetRef

NOW = DatasetRef(
    task="t", uri="d", sha256="split as of now", num_train=1, num_test=1, num_rejected=0, landed_sha256="x"
)


def known_version(number: int, **values: Any) -> VersionInfo:
    """An accepted version that continues the first one."""
    nothing = {field.name: None for field in fields(VersionInfo)}
    known = {
        "accepted": True,
        "lineage": "l",
        "task": "t",
        "version": str(number),
        "run_key": f"run {number}",
        "dataset_sha256": f"split as of then {number}",
        "parent_version": "1" if number > 1 else None,
        "reasons": (),
        "adapter_uri": "a",
        "adapter_sha256": "b",
        "aliases": (),
    }
    return VersionInfo(**{**nothing, **known, **values})  # type: ignore[arg-type]


def test_rows_that_were_split_otherwise_are_a_repeat_of_what_was_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(tmp_path))
    versions = [known_version(1), known_version(2, landed_sha256="x"), known_version(3, landed_sha256="other")]
    by_key = {version.run_key: version for version in versions}
    champion = versions[0]
    registry = SimpleNamespace(
        versions=lambda lineage: versions, champion=lambda lineage: champion, find_version=by_key.get
    )
    monkeypatch.setattr("tasks.adaptation.run.open_registry", lambda: registry)
    monkeypatch.setattr("tasks.adaptation.run.current_store", lambda: store)
    assert find_repeat(NOW, "l") is None, "a version that was overtaken before it was promoted is trained anew"
    for version in versions:
        note_learned(Ledger(store), version)
    found = find_repeat(NOW, "l")
    assert found is not None and (found.version, found.standing) == ("2", "left behind")
    assert find_repeat(NOW.model_copy(update={"landed_sha256": "of other rows"}), "l") is None
    champion = versions[1]
    assert find_repeat(NOW, "l") is None, "its test rows were forgotten, and the arrival brings new ones"
