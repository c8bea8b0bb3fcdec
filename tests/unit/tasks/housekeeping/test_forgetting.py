"""Who learned from an arrival, and what stays of it."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from infra.tracking.runs import artifacts_with_rows

from infra.store.local import FileStore
from tasks.housekeeping.forgetting import affected_versions
from tasks.lineage.tombstones import (
    ForgottenRowsError,
    TestRowsForgottenError,
    Tombstone,
    find_tombstone,
    put_tombstone,
    refuse_forgotten,
    require_test_rows,
)
from tests.unit.tasks.housekeeping.test_garbage import version


def tombstone(**changes: object) -> Tombstone:
    values = {
        "task": "t",
        "sha256": "d" * 64,
        "files": ("f" * 64,),
        "reason": "asked",
        "at": datetime(2026, 6, 1, tzinfo=UTC),
    }
    return Tombstone.model_validate({**values, **changes})


def test_a_version_learned_from_what_it_or_one_before_it_was_trained_on() -> None:
    chain = (
        version(1, dataset_sha256="a"),
        version(2, 1, dataset_sha256="b", aliases=("champion",), accepted=True),
        version(3, 2, dataset_sha256="c"),
        version(4, 1, dataset_sha256="c"),
        version(5, 3, dataset_sha256="a"),
    )
    found = affected_versions(chain, {"b"})
    assert [(each.version, each.is_direct) for each in found] == [("2", True), ("3", False), ("5", False)]
    assert found[0].aliases == ("champion",)
    assert not affected_versions(chain, {"x"})


def test_a_tombstone_refuses_its_dataset_and_its_files_and_no_others(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    put_tombstone(store, tombstone(splits=("5" * 64,), landed=("1" * 64,)))
    for sha256 in ("d" * 64, "f" * 64, "5" * 64, "1" * 64):
        with pytest.raises(ForgottenRowsError, match=r"forgotten on 2026-06-01 \(asked\).*--again"):
            refuse_forgotten(store, "t", [sha256])
    refuse_forgotten(store, "t", ["e" * 64])
    refuse_forgotten(store, "other", ["d" * 64])


def test_forgetting_again_adds_to_what_is_known(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    put_tombstone(store, tombstone(versions=("l/1",)))
    put_tombstone(store, tombstone(files=("0" * 64,), splits=("5" * 64,), versions=("l/2",), reason=""))
    put_tombstone(store, tombstone())
    found = find_tombstone(store, "t", ["0" * 64])
    assert found is not None
    assert (found.versions, found.files, found.reason) == (("l/1", "l/2"), ("f" * 64, "0" * 64), "asked")
    assert found.splits == ("5" * 64,)


def test_only_forgotten_test_rows_are_said_to_be_forgotten(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    uri = f"datasets/t/{'d' * 64}/l/s"
    require_test_rows(store, "t", uri)  # missing, and nobody forgot them: whoever reads them says so
    put_tombstone(store, tombstone())
    with pytest.raises(TestRowsForgottenError, match="arrival of 't' with test rows"):
        require_test_rows(store, "t", uri)
    store.put_bytes(f"{uri}/test.parquet", b"rows")
    require_test_rows(store, "t", uri)


def test_artifacts_made_of_rows_are_told_from_the_others() -> None:
    paths = ["evaluation.json", "report.json", "figures/loss.png", "report.html", "figures/report.html"]
    assert artifacts_with_rows(paths) == ("report.json", "report.html")
