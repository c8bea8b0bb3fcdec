"""Which version is named for rows that land again."""

from __future__ import annotations

from pathlib import Path

from infra.store.opening import open_store
from tasks.adaptation.repeat import find_repeat
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
