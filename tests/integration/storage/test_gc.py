"""What stays after learning, and what `deal data gc` removes, on a base model of two layers."""

from __future__ import annotations

import json
import os
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock
from typer.testing import CliRunner

from deal_core.errors import ConfigError, DealError, RegistryError
from deal_pipeline.cli.app import app
from flows.adapt_result import AdaptResult
from infra.predictions import read_feedback, read_predictions
from infra.store.keys import log_key
from infra.store.opening import open_store
from infra.versions import Versions
from tasks.lineage.datasets import read_manifest
from tasks.lineage.history import find_version
from tasks.predict import predict
from tests.adapting import CLINIC, record_of, run
from tests.integration.storage.conftest import collect, keys, land, logged

pytestmark = pytest.mark.usefixtures("prefect_api", "home")


@pytest.mark.usefixtures("without_mlflow")
def test_training_rows_stay_only_where_an_arrival_asks_for_it(tiny_base: Path, first: AdaptResult) -> None:
    train = f"{first.dataset.uri}/train.parquet"
    store = open_store()
    assert not store.exists(train) and store.exists(f"{first.dataset.uri}/test.parquet")
    test_rows = store.get_bytes(f"{first.dataset.uri}/test.parquet")
    assert run(tiny_base, land()).status == "repeat"
    assert not store.exists(train), "a repeated run leaves none"
    assert store.get_bytes(f"{first.dataset.uri}/test.parquet") == test_rows
    retained = run(tiny_base, CLINIC, data={"retain_training_rows": True})
    assert retained.status == "promoted" and store.exists(f"{retained.dataset.uri}/train.parquet")
    assert run(tiny_base, CLINIC).status == "repeat"
    assert "training rows" not in {each.kind for each in collect("l", "0h", dry_run=True).removals}
    assert store.exists(f"{retained.dataset.uri}/train.parquet")


@pytest.mark.usefixtures("without_mlflow")
def test_lineages_that_ask_otherwise_about_the_same_rows_both_stay_right(tiny_base: Path, first: AdaptResult) -> None:
    other = run(tiny_base, {**land(), "instruction": "Which one?"}, lineage="m")
    assert other.dataset.sha256 == first.dataset.sha256 and other.dataset.uri != first.dataset.uri
    store = open_store()
    asked = [read_manifest(store, result.dataset.uri).task.instruction for result in (first, other)]
    assert asked == ["What is it about?", "Which one?"]
    uris = [record_of(result).tasks[0].test_uris[0] for result in (first, other)]
    assert uris == [first.dataset.uri, other.dataset.uri]


def test_gc_removes_exactly_what_its_dry_run_says(copied_home: Path) -> None:
    """Version 2 of `l` was rejected. Version 3, the champion, continues 1."""
    home, store = copied_home, open_store()
    rejected = find_version(store, "l", "2")
    (rows,) = {info.key.rpartition("/")[0] for info in store.list("datasets/clinic")}
    store.put_bytes("adapters/l/0123456789abcdef/adapter_config.json", b"{}")
    assert not store.exists(f"{rows}/train.parquet")
    store.put_bytes(f"{rows}/train.parquet", b"left by a crash")
    work = home / "work" / "l" / "fedcba9876543210"
    work.mkdir(parents=True)
    (work / "checkpoint").write_bytes(bytes(100))
    for left in (home / "tmp" / "x", home / "store" / ".incoming" / "y"):
        left.parent.mkdir(exist_ok=True)
        left.write_bytes(bytes(7))
        os.utime(left, (0, 0))
    assert collect("l").removals == (), "all files are younger than thirty days"
    before = {path for path in home.joinpath("store").rglob("*") if path.is_file()}
    planned = collect(older_than="0h", dry_run=True)
    assert {path for path in home.joinpath("store").rglob("*") if path.is_file()} == before and work.is_dir()
    adapters = sorted(["0123456789abcdef", rejected.run_key[:16]])
    assert [(each.kind, each.address.rsplit("/", 1)[1]) for each in planned.removals] == [
        ("temporary files", "x"),
        ("temporary files", "y"),
        ("work folder", "fedcba9876543210"),
        *(("adapter", key) for key in adapters),
        ("training rows", "train.parquet"),
    ]
    done = collect(older_than="0h")
    assert (done.removals, done.num_bytes) == (planned.removals, planned.num_bytes)
    assert not work.exists() and not [key for key in adapters if keys(f"adapters/l/{key}")]
    assert collect(older_than="0h").removals == ()

    removed = {version.version: version.since.adapter_removed for version in Versions(store).all("l")}
    assert removed == {"1": None, "2": f"{datetime.now(UTC):%Y-%m-%d}", "3": None}
    with pytest.raises(RegistryError, match="adapter of version 2 of 'l' was removed on"):
        find_version(store, "l", "2")
    assert predict(store, "hello", lineage="l", task=None, version=None).version == "3"


def test_a_lineage_with_a_problem_does_not_keep_gc_from_the_others(
    first: AdaptResult, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a damaged or missing entry, nobody can say which adapters are needed."""
    store, entry = open_store(), "versions/l/00000001.json"
    whole = store.get_bytes(entry)
    store.put_bytes(entry, b"{")
    store.put_bytes("adapters/m/0123456789abcdef/adapter_config.json", b"{}")
    before = keys("adapters/l")
    found = CliRunner().invoke(app, ["data", "gc", "--older-than", "1h", "--dry-run", "--home", str(home), "--json"])
    assert found.exit_code == 1, found.output
    assert list(json.loads(found.stdout)["problems"]) == ["l"]
    with monkeypatch.context() as patch:
        patch.setattr("flows.gc.runtime", SimpleNamespace(deployment=SimpleNamespace(id="of a server")))
        with pytest.raises(DealError, match=r"Lineage 'l': .*the entry of version 1 of 'l', is damaged"):
            collect(older_than="1000d")  # a run of a server is red, so that people see it
    done = collect(older_than="0h")
    assert [each.address for each in done.removals if each.kind == "adapter"] == ["adapters/m/0123456789abcdef"]
    assert "the entry of version 1 of 'l', is damaged" in done.problems["l"]
    assert keys("adapters/m") == [] and keys("adapters/l") == before
    store.delete(entry)
    assert "lacks the entry of version 1 of 'l', which the promotion log names" in collect("l", "0h").problems["l"]
    assert keys("adapters/l") == before
    store.put_bytes(entry, whole)
    assert not collect("l", "0h").problems, "as the message says"


@pytest.mark.usefixtures("first")
def test_what_cannot_be_removed_keeps_gc_from_nothing_else(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for lineage in ("k", "l"):
        left = home / "work" / lineage / "0123456789abcdef"
        left.mkdir(parents=True)
        os.utime(left, (0, 0))
    monkeypatch.setenv("DEAL_LOG_RETENTION_DAYS", "10")
    open_store().put_bytes(log_key("predictions", "l", datetime.now(UTC) - timedelta(days=20)), b"")
    open_store().put_bytes("predictions/l/aside/broken.parquet", b"no batch")
    remove = shutil.rmtree

    def refuse(path: object, **options: object) -> None:
        if "/work/k/" in str(path):
            raise PermissionError("owned by root")
        remove(str(path), **options)  # type: ignore[arg-type]

    monkeypatch.setattr("tasks.housekeeping.garbage.shutil.rmtree", refuse)
    done = collect(older_than="1d")
    assert list(done.problems) == ["k"] and "owned by root" in done.problems["k"]
    assert not list((home / "work" / "l").iterdir()) and keys("predictions") == ["predictions/l/aside/broken.parquet"]


@pytest.mark.usefixtures("first")
def test_gc_refuses_what_it_cannot_mean() -> None:
    for lineage, age in (("..", "30d"), ("l", "a month"), ("nobody", "1d")):
        with pytest.raises(ConfigError):
            collect(lineage, age)


@pytest.mark.usefixtures("first")
def test_gc_removes_logs_beyond_the_retention_and_no_younger_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store()
    logged(["one"])
    assert len(read_predictions(store, "l")) == len(read_feedback(store, "l")) == 1
    (young,), (said,) = keys("predictions"), keys("feedback")
    for days in (10, 11, 12):
        for log, new in (("predictions", young), ("feedback", said)):
            store.put_bytes(log_key(log, "l", datetime.now(UTC) - timedelta(days=days)), store.get_bytes(new))
    assert not collect("l").removals
    monkeypatch.setenv("DEAL_LOG_RETENTION_DAYS", "10")
    planned = collect("l", dry_run=True).removals
    assert sorted(each.kind for each in planned) == [*["feedback"] * 2, *["prediction log"] * 2]
    assert len(keys("predictions")) == 4, "a plan removes nothing"
    assert collect("l").removals == planned
    assert len(keys("predictions")) == len(keys("feedback")) == 2
    assert young in keys("predictions") and not collect("l").removals


@pytest.mark.usefixtures("first")
def test_gc_joins_the_batches_of_a_lineage_that_no_run_works_on(home: Path) -> None:
    ids = [*logged(["one"]), *logged(["two"])]
    logs, batches = ("predictions", "feedback"), [*keys("predictions"), *keys("feedback")]
    (home / "locks").mkdir(exist_ok=True)
    with FileLock(home / "locks" / "l.lock"):
        assert collect("l").busy == ("l",)
    collect("l", dry_run=True)
    assert [*keys("predictions"), *keys("feedback")] == batches
    done = collect("l")
    assert not done.removals and len(batches) == 4
    assert [len(keys(log)) for log in logs] == [1, 1] and not {*batches} & {*keys("predictions"), *keys("feedback")}
    store = open_store()
    assert [*read_predictions(store, "l")["id"]] == ids and {*read_feedback(store, "l")["id"]} == {*ids}
