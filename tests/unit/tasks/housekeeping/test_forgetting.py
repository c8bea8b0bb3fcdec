"""Who learned from an arrival, and what stays of it."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import Tensor

from deal_core.adapter.files import METHOD_FILE, METHOD_TENSORS_FILE, as_recorded, digests_of
from deal_core.adapter.state import kept_of_tasks
from deal_core.strategies.kept_rows import pack, rows_name
from deal_core.strategies.rehearsal import RehearsedRow
from infra.run_journal import RunJournal
from infra.store import keys
from infra.store.local import FileStore
from infra.versions import Version
from tasks.housekeeping.arrivals import KnownArrival, find_arrival
from tasks.housekeeping.forgetting import affected_versions, forget_held, plan_forgetting
from tasks.lineage.tombstones import (
    ForgottenRowsError,
    TestRowsForgottenError,
    Tombstone,
    find_tombstone,
    put_tombstone,
    refuse_forgotten,
    require_test_rows,
)
from tests.stored_versions import put_version, run, run_key, version


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
        with pytest.raises(ForgottenRowsError, match=r"forgotten on 2026-06-01 \(asked\).*--force"):
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
    require_test_rows(store, "t", [uri])  # missing, and nobody forgot them: whoever reads them says so
    put_tombstone(store, tombstone())
    with pytest.raises(TestRowsForgottenError, match="arrival of 't' with test rows"):
        require_test_rows(store, "t", [uri])
    store.put_bytes(f"{uri}/test.parquet", b"rows")
    require_test_rows(store, "t", [uri])


FORGOTTEN = "d" * 64


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FileStore:
    """Four runs with a report: two learned the arrival, of which one failed; one continues its version; one is another.

    The adapter of the continuing version was removed, so nobody knows what judged it.
    """
    monkeypatch.setenv("DEAL_HOME", str(tmp_path / "home"))
    found = FileStore(tmp_path / "store")
    put_version(found, version(1, dataset_sha256=FORGOTTEN, accepted=True))
    put_version(found, version(2, 1, dataset_sha256="e" * 64))
    put_version(found, version(3, dataset_sha256="e" * 64))
    found.put_bytes(f"{keys.version_folder('l')}/00000002.removed.json", b'{"schema_version": 1, "day": "2030-01-01"}')
    for number, sha256 in ((1, FORGOTTEN), (2, "e" * 64), (3, "e" * 64), (4, FORGOTTEN)):
        RunJournal(found).start(run(number, dataset_sha256=sha256))
        for name in ("report.json", "evaluation.json", "live.json", "another.txt"):
            found.put_bytes(keys.report_key("l", run_key(number), name), b"a row")
    return found


def arrival_of(store: FileStore) -> KnownArrival:
    return find_arrival(store, FORGOTTEN[:8])


def orders(store: FileStore) -> dict[str, bytes]:
    return {info.key: store.get_bytes(info.key) for info in store.list("mlflow")}


def reports(store: FileStore) -> list[str]:
    return [info.key.removeprefix("reports/l/") for info in store.list("reports")]


def test_reports_of_the_runs_with_rows_go_and_figures_stay(store: FileStore) -> None:
    plan = plan_forgetting(store, arrival_of(store))
    assert {each.kind for each in plan.held} == {"report"}
    assert orders(store) == {} and len(reports(store)) == 16, "a plan changes nothing"
    forget_held(store, plan)
    short = {number: run_key(number)[:16] for number in range(1, 5)}
    assert orders(store) == {f"mlflow/l/{short[number]}.forget": run_key(number).encode() for number in (1, 2, 4)}
    assert [key for key in reports(store) if short[3] in key] == [
        f"{short[3]}/{name}" for name in ("another.txt", "evaluation.json", "live.json", "report.json")
    ]
    left = [f"{short[number]}/{name}" for number in (1, 2, 4) for name in ("evaluation.json", "live.json")]
    assert [key for key in reports(store) if short[3] not in key] == left
    assert len(RunJournal(store).all("l")) == 4, "a journal has no rows"
    assert plan_forgetting(store, arrival_of(store)).held == ()


def test_rows_that_a_killed_run_left_without_their_manifest_go_with_any_arrival_of_the_task(store: FileStore) -> None:
    """Nobody knows of which arrival they are. Rows of another task stay."""
    for task in ("bank", "clinic"):
        for name in ("train.parquet", "test.parquet"):
            store.put_bytes(f"{keys.dataset_uri(task, '9' * 64, 'l', 's' * 64)}/{name}", b"a row")
    plan = plan_forgetting(store, arrival_of(store))
    assert {each.kind for each in plan.held} == {"report", "training rows", "test rows"}
    forget_held(store, plan)
    assert {keys.task_and_digest(info.key)[0] for info in store.list("datasets")} == {"clinic"}


@pytest.mark.parametrize("num_deleted", [0, 1, 3])
def test_orders_for_mlflow_outlive_a_call_that_is_killed_while_it_removes(
    store: FileStore, monkeypatch: pytest.MonkeyPatch, num_deleted: int
) -> None:
    """Its next call finds fewer rows, and the orders of the first one still stand."""
    delete, deleted = store.delete, list[str]()

    def die(key: str) -> int:
        if len(deleted) == num_deleted:
            raise KeyboardInterrupt
        deleted.append(key)
        return delete(key)

    whole = plan_forgetting(store, arrival_of(store))
    with monkeypatch.context() as patch:
        patch.setattr(store, "delete", die)
        with pytest.raises(KeyboardInterrupt):
            forget_held(store, whole)
    ordered = orders(store)
    assert len(ordered) == 3 and len(reports(store)) == 16 - num_deleted
    again = plan_forgetting(store, arrival_of(store))
    assert len(again.held) == len(whole.held) - num_deleted
    forget_held(store, again)
    assert orders(store) == ordered and plan_forgetting(store, arrival_of(store)).held == ()


def test_what_jobs_have_read_goes_and_the_checkpoints_of_other_runs_stay(store: FileStore) -> None:
    """Any run may have been asked the arrival's test rows, also one that no journal knows; a lineage without it not."""
    store.put_bytes(f"{keys.dataset_uri('bank', FORGOTTEN, 'l', 's' * 64)}/some.file", b"{}")
    for uri in ("l/0000000000000003", "l/0000000000000004", "l/not-started", "m/0000000000000003"):
        for name in ("inputs/rows-0.parquet", "inputs/adapter/method.json", "checkpoints/checkpoint-2/COMPLETE"):
            store.put_bytes(f"adapters/{uri}/jobs/score/{name}", b"a row")
    plan = plan_forgetting(store, arrival_of(store))
    rows = {place.address: place.num_bytes for place in plan.held if place.kind == "rows of a job"}
    assert rows == {f"adapters/l/{run}/jobs/score/inputs": 10 for run in ("0000000000000003", "not-started")}
    forget_held(store, plan)
    left = [info.key.removeprefix("adapters/").partition("/jobs/score/")[::2] for info in store.list("adapters")]
    checkpoint = "checkpoints/checkpoint-2/COMPLETE"
    assert left == [
        ("l/0000000000000003", checkpoint),
        ("l/not-started", checkpoint),
        ("m/0000000000000003", checkpoint),
        ("m/0000000000000003", "inputs/adapter/method.json"),
        ("m/0000000000000003", "inputs/rows-0.parquet"),
    ]


ROWS = pack([RehearsedRow([1, 2, 3], [4]), RehearsedRow([5], [6, 7])])
HEADER = {"schema_version": 1, "strategy": "deal", "stores": "data", "num_bytes": 0, "num_arrivals": 1}


def keep(store: FileStore, folder: Path, kept: dict[str, Tensor], stored: Version) -> None:
    """Store a version with these tensors in its method's state."""
    folder.mkdir()
    (folder / METHOD_FILE).write_text(json.dumps(HEADER))
    if kept:
        save_file({name: rows.clone() for name, rows in kept.items()}, folder / METHOD_TENSORS_FILE)
    store.upload_folder(folder, stored.adapter_uri)
    put_version(store, stored.model_copy(update={"files_sha256": as_recorded(digests_of(folder))}))


def test_kept_rows_go_from_versions_that_learned_the_arrival_or_descend_from_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of other tasks stay, and rows of the task in a version that has never learned the arrival."""
    monkeypatch.setenv("DEAL_HOME", str(tmp_path / "home"))
    store, mine, others = FileStore(tmp_path / "store"), rows_name("bank"), rows_name("u")
    versions = {
        "1": ({mine: ROWS}, version(1, dataset_sha256=FORGOTTEN)),
        "2": ({mine: ROWS, others: ROWS}, version(2, 1, dataset_sha256="e" * 64)),
        "3": ({mine: ROWS}, version(3, dataset_sha256="f" * 64)),
        "4": ({}, version(4, 2, dataset_sha256="f" * 64)),
        "5": ({mine: ROWS, others: ROWS}, version(5, 3, dataset_sha256="e" * 64)),
    }
    for number, (kept, stored) in versions.items():
        keep(store, tmp_path / number, kept, stored)
    RunJournal(store).start(run(1, dataset_sha256=FORGOTTEN))
    plan = plan_forgetting(store, arrival_of(store))
    assert [place.version for place in plan.held if place.kind == "rows kept by the method"] == ["1", "2"]
    forget_held(store, plan)

    def left(number: str) -> dict[str, int]:
        folder = tmp_path / f"{number}-left"
        store.download_folder(versions[number][1].adapter_uri, folder)
        return kept_of_tasks(folder)

    size = len(ROWS)
    assert {number: left(number) for number in versions} == {
        "1": {mine: 0},
        "2": {mine: 0, others: size},
        "3": {mine: size},
        "4": {},
        "5": {mine: size, others: size},
    }
    assert plan_forgetting(store, arrival_of(store)).held == ()
