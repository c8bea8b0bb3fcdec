"""Runs and versions in a real MLflow on SQLite. Every test has its own lineages."""

from __future__ import annotations

import json
import os
import sqlite3
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from threading import Barrier
from typing import Any

import mlflow
import pytest
from infra.tracking.database import DatabaseReader, open_reader
from infra.tracking.facts import VersionFacts, VersionInfo
from infra.tracking.mlflow_reader import MlflowReader
from infra.tracking.registry import Registry, open_registry
from mlflow.exceptions import MlflowException

from deal_core.errors import RegistryError
from infra.settings import TrackingSettings
from infra.tracking import mlflow_reader
from infra.tracking.tracker import TrackedRun, Tracker, open_tracker


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> TrackingSettings:
    home = tmp_path_factory.mktemp("mlflow") / "deal home"
    return TrackingSettings(
        home=home, tracking_uri=f"sqlite:///{home}/mlflow.db", artifact_uri=(home / "mlflow-artifacts").as_uri()
    )


@pytest.fixture
def tracker(settings: TrackingSettings) -> Tracker:
    return open_tracker(settings)


@pytest.fixture
def registry(settings: TrackingSettings) -> Registry:
    return open_registry(settings)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"r": 16}')
    (folder / "adapter_model.safetensors").write_bytes(b"\x00weights")
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test changes MLflow's global address or writes to the working folder."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    before = mlflow.get_tracking_uri(), os.environ.get("MLFLOW_TRACKING_URI")
    yield
    assert (mlflow.get_tracking_uri(), os.environ.get("MLFLOW_TRACKING_URI")) == before
    assert list(folder.iterdir()) == []


FACTS = VersionFacts(
    run_key="key-1",
    task="billing",
    strategy="deal",
    base_sha256="b" * 64,
    dataset_sha256="d" * 64,
    config_sha256="c" * 64,
    adapter_uri="adapters/base/key-1",
    adapter_sha256="a" * 64,
    files_sha256={},
    landed_sha256="e" * 64,
    train_seconds=1.0,
    parent_version=None,
    accepted=True,
    reasons=(),
    average_accuracy=0.75,
    forgetting=None,
    backward_transfer=None,
    forward_transfer=None,
)


def register(tracker: Tracker, registry: Registry, adapter: Path, lineage: str, facts: VersionFacts) -> VersionInfo:
    with tracker.start(lineage, facts.run_key, name=facts.task) as run:
        model_id = run.log_adapter(adapter, facts.task, sha256=facts.adapter_sha256)
        return registry.register(lineage, facts, tracking_id=run.run_id, model_id=model_id)


def points(run: TrackedRun, key: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in run.client.get_metric_history(run.run_id, key)]


def test_all_that_a_run_logs_is_found_in_mlflow(tracker: Tracker, settings: TrackingSettings, adapter: Path) -> None:
    params = {"strategy": "deal", "train": {"learning_rate": 5e-4, "nested": {"x": None}}, "empty": {}}
    with tracker.start("all", "k", name="billing", params=params, tags={"deal.parent_version": "3"}) as run:
        for step in range(1, 6):
            run.log(step, {"train/loss": 1 / step, "train/grad_norm": 2.0})
        run.log_metrics({"average_accuracy": 0.5, "accuracy/bank.v-2_x": 0.25, "forgetting": None})
        run.log_stage("train", 4.0, num_rows=100)
        run.log_stage("gate", 0.5)
        run.log_dataset("billing", "f" * 64, "s3://bucket/datasets/billing", {"num_train": 3, "num_test": 1})
        run.log_json("evaluation.json", {"task": "Rückfragen", "value": None})
        model_id = run.log_adapter(adapter, "billing.v1/x", sha256="a" * 64)

    found = tracker.client.get_run(run.run_id)
    assert found.info.status == "FINISHED" and found.info.end_time is not None and found.info.run_name == "billing"
    assert tracker.client.get_experiment(found.info.experiment_id).name == "deal/all"
    assert found.data.params == {
        "strategy": "deal",
        "train.learning_rate": "0.0005",
        "train.nested.x": "None",
        "empty": "{}",
    }
    assert found.data.tags["deal.run_key"] == "k" and found.data.tags["deal.parent_version"] == "3"
    assert found.data.metrics == {
        "train/loss": 0.2,
        "train/grad_norm": 2.0,
        "average_accuracy": 0.5,
        "accuracy/bank.v-2_x": 0.25,
        "seconds/train": 4.0,
        "rows_per_second/train": 25.0,
        "seconds/gate": 0.5,
    }
    assert points(run, "train/loss") == [(step, 1 / step) for step in range(1, 6)]
    (dataset,) = found.inputs.dataset_inputs
    assert dataset.dataset.digest == "f" * 36
    assert json.loads(dataset.dataset.source) == {"uri": "s3://bucket/datasets/billing"}
    assert {tag.key: tag.value for tag in dataset.tags}["deal.dataset_sha256"] == "f" * 64
    assert json.loads(dataset.dataset.profile) == {"num_train": 3, "num_test": 1}

    assert found.info.artifact_uri.startswith(settings.artifact_uri)
    folder = Path(tracker.client.download_artifacts(run.run_id, "", str(adapter.parent)))
    assert json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["task"] == "Rückfragen"
    model = tracker.client.get_logged_model(model_id)
    assert (str(model.status), model.model_type) == ("READY", "lora-adapter")
    assert {item.path for item in tracker.client.list_logged_model_artifacts(model_id)} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert [output.model_id for output in found.outputs.model_outputs] == [model_id]


def test_a_killed_run_is_continued_and_nothing_is_doubled(tracker: Tracker, settings: TrackingSettings) -> None:
    killed = tracker.start("killed", "k", name="billing", params={"a": 1, "b": 2})
    for step in (1, 2, 3):
        killed.log(step, {"loss": float(step)})
    killed.flush()
    del killed

    other = tracker.start("killed", "another", name="billing")
    with open_tracker(settings).start("killed", "k", name="billing", params={"a": 1, "b": 3, "c": 4}) as run:
        assert tracker.client.get_run(run.run_id).info.status == "RUNNING"
        for step in (2, 3, 4):
            run.log(step, {"loss": 10.0 * step, "late": 1.0})
        for _ in range(2):
            run.log_dataset("billing", "f" * 64, "file:///x", {})
    assert run.run_id != other.run_id
    assert points(run, "loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    assert points(run, "late") == [(2, 1.0), (3, 1.0), (4, 1.0)]
    found = tracker.client.get_run(run.run_id)
    assert found.data.params == {"a": "1", "b": "2", "c": "4"}
    assert len(found.inputs.dataset_inputs) == 1
    assert found.info.status == "FINISHED"
    other.end()


def test_a_finished_run_that_goes_on_is_running_again(tracker: Tracker) -> None:
    tracker.start("again", "k", name="x").end("FAILED")
    run = tracker.start("again", "k", name="x")
    assert tracker.client.get_run(run.run_id).info.status == "RUNNING"
    run.end("FINISHED")
    assert tracker.client.get_run(run.run_id).info.status == "FINISHED"


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_a_run_that_breaks_ends_as_failed(tracker: Tracker, kind: type[BaseException]) -> None:
    run = tracker.start("breaks", kind.__name__, name="x")
    run.log(1, {"loss": 1.0})
    run.log(2, {"loss": 2.0})
    with pytest.raises(kind, match="secret text"), run:
        raise kind("secret text of a row")
    found = tracker.client.get_run(run.run_id)
    assert found.info.status == "FAILED" and found.info.end_time is not None
    assert found.data.tags["deal.error"] == kind.__name__
    assert "secret text" not in str(found.to_dictionary())
    assert points(run, "loss") == [(1, 1.0), (2, 2.0)]


def test_the_curve_waits_while_mlflow_is_away(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = tracker.start("away", "k", name="x")

    def refuse(*_: object, **__: object) -> None:
        raise MlflowException("the server is away")

    with monkeypatch.context() as patch:
        patch.setattr(run.client, "log_batch", refuse)
        for step in range(3):
            run.log(step, {"loss": float(step)})
        assert "the server is away" in caplog.text
        with pytest.raises(RegistryError, match=r"log metrics of run.*the server is away"):
            run.flush()
    assert points(run, "loss") == []
    run.end()
    assert points(run, "loss") == [(0, 0.0), (1, 1.0), (2, 2.0)]


def test_a_dead_mlflow_takes_ever_less_of_the_training_and_no_point_is_lost(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, sends = 0.0, []
    monkeypatch.setattr("infra.tracking.tracker.monotonic", lambda: now)
    run = tracker.start("dead", "k", name="x")

    def give_up_late(*_: object, **__: object) -> None:
        nonlocal now
        began, now = now, now + 240.0
        sends.append((began, now))
        raise MlflowException("the server is away")

    with monkeypatch.context() as patch:
        for name in ("log_batch", "get_metric_history"):
            patch.setattr(run.client, name, give_up_late)
        for step in range(4000):
            now += 1.0
            run.log(step, {"loss": float(step)})
    pauses = [after[0] - before[1] for before, after in pairwise(sends)]
    assert pauses == [240.0, 480.0, 960.0, 1920.0]
    now += 3600.0
    run.log(4000, {"loss": 4000.0})
    wanted = [(step, float(step)) for step in range(4001)]
    assert points(run, "loss") == wanted, "the server answers again"
    now += 1.0
    run.log(4001, {"loss": 4001.0})
    assert len(points(run, "loss")) == 4002, "and points are sent every second again"
    run.end()


def test_many_parameters_and_points_go_in_batches(tracker: Tracker) -> None:
    with tracker.start("many", "k", name="x", params={f"p{number:03d}": number for number in range(250)}) as run:
        for step in range(1200):
            run.log(step, {"loss": 1.0})
    assert len(tracker.client.get_run(run.run_id).data.params) == 250
    assert len(points(run, "loss")) == 1200


def test_an_adapter_whose_upload_broke_is_completed(
    tracker: Tracker, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tracker.start("upload", "k", name="x")

    def break_down(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run.client, "log_model_artifacts", break_down)
        with pytest.raises(KeyboardInterrupt):
            run.log_adapter(adapter, "billing", sha256="a" * 64)
    model_id = tracker.run(run.run_id).log_adapter(adapter, "billing", sha256="a" * 64)
    assert tracker.run(run.run_id).log_adapter(adapter, "billing", sha256="a" * 64) == model_id
    experiment = tracker.client.get_run(run.run_id).info.experiment_id
    assert [model.model_id for model in tracker.client.search_logged_models([experiment])] == [model_id]
    assert str(tracker.client.get_logged_model(model_id).status) == "READY"
    assert len(tracker.client.list_logged_model_artifacts(model_id)) == 2
    run.end()


def test_an_adapter_that_was_trained_anew_is_not_taken_for_the_one_that_is_kept(
    tracker: Tracker, adapter: Path
) -> None:
    run = tracker.start("anew", "k", name="x")
    first = run.log_adapter(adapter, "billing", sha256="a" * 64)
    (adapter / "adapter_model.safetensors").write_bytes(b"\x00others")
    second = tracker.run(run.run_id).log_adapter(adapter, "billing", sha256="b" * 64)
    for model_id, digest, weights in ((first, "a" * 64, b"\x00weights"), (second, "b" * 64, b"\x00others")):
        model = tracker.client.get_logged_model(model_id)
        assert model.tags["deal.adapter_sha256"] == digest
        kept = Path(model.artifact_location.removeprefix("file://").replace("%20", " ")) / "adapter_model.safetensors"
        assert kept.read_bytes() == weights
    assert tracker.run(run.run_id).log_adapter(adapter, "billing", sha256="b" * 64) == second
    run.end()


def test_artifacts_go_where_the_setting_says(settings: TrackingSettings, tmp_path: Path) -> None:
    moved = settings.model_copy(update={"artifact_uri": (tmp_path / "there").as_uri()})
    with open_tracker(moved).start("moved", "k", name="x") as run:
        run.log_json("a.json", {})
    assert len(list((tmp_path / "there" / "moved").rglob("a.json"))) == 1


def test_an_experiment_that_was_deleted_comes_back(tracker: Tracker) -> None:
    first = tracker.start("deleted", "k", name="x")
    first.end()
    experiment = tracker.client.get_run(first.run_id).info.experiment_id
    tracker.client.delete_experiment(experiment)
    with tracker.start("deleted", "k2", name="x") as run:
        assert tracker.client.get_run(run.run_id).info.experiment_id == experiment


def test_an_experiment_that_another_process_makes_meanwhile_is_taken(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tracker.start("meanwhile", "k", name="x") as run:
        experiment = tracker.client.get_run(run.run_id).info.experiment_id
    look = tracker.client.get_experiment_by_name
    looks = iter([None])
    monkeypatch.setattr(tracker.client, "get_experiment_by_name", lambda name: next(looks, look(name)))
    with tracker.start("meanwhile", "k2", name="x") as run:
        assert tracker.client.get_run(run.run_id).info.experiment_id == experiment


def test_an_address_that_does_not_answer_is_said_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    settings = TrackingSettings.model_validate({"tracking_uri": "http://somebody:hidden@127.0.0.1:9"})
    with pytest.raises(RegistryError, match=r"127\.0\.0\.1:9.*MLFLOW_TRACKING_URI") as caught:
        open_tracker(settings).start("base", "k", name="x")
    assert "hidden" not in "".join(traceback.format_exception(caught.value)), "nor where a log shows the causes"


def test_versions_are_read_back_as_they_were_registered(tracker: Tracker, registry: Registry, adapter: Path) -> None:
    all_of_them = (
        FACTS,
        replace(
            FACTS,
            run_key="key-2",
            task="clinic",
            parent_version="1",
            forgetting=0.0,
            forward_transfer=-0.125,
            files_sha256={"adapter_model.safetensors": ("a" * 64,), "method.json": ("b" * 64, "c" * 64)},
        ),
        replace(
            FACTS, run_key="key-3", accepted=False, reasons=('billing: −12 points; "limit" 10', "new: 40 % < 50 %")
        ),
    )
    for facts in all_of_them:
        register(tracker, registry, adapter, "read-back", facts)
    versions = registry.versions("read-back")
    assert [version.version for version in versions] == ["1", "2", "3"]
    for version, facts in zip(versions, all_of_them, strict=True):
        assert {field.name: getattr(version, field.name) for field in fields(facts)} == {
            field.name: getattr(facts, field.name) for field in fields(facts)
        }
        assert (version.lineage, version.aliases) == ("read-back", ())
    assert registry.find_version("key-2") == versions[1]
    assert registry.find_version("key-9") is None
    assert registry.versions("unknown") == ()
    assert registry.champion("unknown") is None


def test_the_version_leads_to_its_run_and_files(tracker: Tracker, registry: Registry, adapter: Path) -> None:
    version = register(tracker, registry, adapter, "leads", replace(FACTS, run_key="leads-1"))
    assert tracker.client.get_run(version.tracking_id).data.tags["deal.run_key"] == "leads-1"
    names = {item.path for item in tracker.client.list_logged_model_artifacts(version.model_id)}
    assert "adapter_config.json" in names
    uri = tracker.client.get_model_version_download_uri("leads", "1")
    assert uri == tracker.client.get_logged_model(version.model_id).artifact_location


def test_registering_again_makes_no_second_version(
    tracker: Tracker, registry: Registry, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    facts = replace(FACTS, run_key="twice-1")
    with monkeypatch.context() as patch:
        patch.setattr(registry.client, "set_logged_model_tags", die)  # called after the version was made
        with pytest.raises(KeyboardInterrupt):
            register(tracker, registry, adapter, "twice", facts)
    version = register(tracker, registry, adapter, "twice", facts)
    assert registry.versions("twice") == (version,)
    assert version.dataset_sha256 == facts.dataset_sha256


def test_of_a_version_whose_making_was_sent_twice_the_first_counts(
    tracker: Tracker, registry: Registry, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = registry.client.create_model_version

    def lose_first_answer(*args: Any, **options: Any) -> Any:
        make(*args, **options)
        return make(*args, **options)

    facts = replace(FACTS, run_key="doubled-1")
    monkeypatch.setattr(registry.client, "create_model_version", lose_first_answer)
    made = register(tracker, registry, adapter, "doubled", facts)
    assert [version.version for version in registry.versions("doubled")] == ["1", "2"]
    assert made.version == "1"
    assert made == registry.find_version("doubled-1") == register(tracker, registry, adapter, "doubled", facts)
    shown = registry.client.get_logged_model(made.model_id).tags["mlflow.modelVersions"]
    assert json.loads(shown) == [{"name": "doubled", "version": "1"}]


def test_aliases_move_and_a_rejected_version_gets_none(tracker: Tracker, registry: Registry, adapter: Path) -> None:
    for number, accepted in ((1, True), (2, False), (3, True)):
        facts = replace(FACTS, run_key=f"alias-{number}", accepted=accepted, reasons=() if accepted else ("too low",))
        register(tracker, registry, adapter, "alias", facts)
    assert registry.champion("alias") is None
    registry.set_alias("alias", "champion", "1")
    registry.set_alias("alias", "challenger", "1")
    with pytest.raises(RegistryError, match=r"Version 2 of 'alias' did not pass its gate.*too low"):
        registry.set_alias("alias", "champion", "2")
    with pytest.raises(RegistryError, match=r"'alias' has no version 9"):
        registry.set_alias("alias", "champion", "9")
    assert [version.aliases for version in registry.versions("alias")] == [("challenger", "champion"), (), ()]
    registry.set_alias("alias", "challenger", "3")
    registry.set_alias("alias", "champion", "3")
    champion = registry.champion("alias")
    assert champion is not None and champion.version == "3"
    assert champion == registry.with_alias("alias", "challenger") == registry.versions("alias")[2]


def test_of_many_that_set_a_tag_or_an_alias_first_at_once_none_fails(
    tracker: Tracker, registry: Registry, adapter: Path
) -> None:
    register(tracker, registry, adapter, "at-once", replace(FACTS, run_key="at-once"))
    names, start = [f"name_{number}" for number in range(10)], Barrier(4)

    def write(_: int) -> None:
        for name in names:
            start.wait(20)
            registry.tag_version("at-once", "1", {name: "set"})
        start.wait(20)
        registry.set_alias("at-once", "challenger", "1")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    tags = registry.client.get_model_version("at-once", "1").tags
    assert all(tags[f"deal.{name}"] == "set" for name in names)


def test_a_registered_model_of_somebody_else_is_left_alone(tracker: Tracker, registry: Registry, adapter: Path) -> None:
    tracker.client.create_registered_model("theirs")
    with pytest.raises(RegistryError, match=r"'theirs' that is no lineage.*another name"):
        register(tracker, registry, adapter, "theirs", replace(FACTS, run_key="theirs-1"))
    assert registry.versions("theirs") == ()


def test_all_versions_come_however_many_there_are(
    tracker: Tracker, registry: Registry, settings: TrackingSettings, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_reader, "PAGE", 4)
    for number in range(11):
        register(tracker, registry, adapter, "pages", replace(FACTS, run_key=f"pages-{number}"))
    numbers, reader = [str(number) for number in range(1, 12)], MlflowReader(settings)
    assert [version.version for version in reader.versions("pages")] == numbers
    for newest in (1, 3, 4, 9, 11, 30):
        assert [version.version for version in reader.versions("pages", newest=newest)] == numbers[-newest:]


def test_a_reader_of_the_file_finds_what_mlflows_client_finds(
    tracker: Tracker, registry: Registry, settings: TrackingSettings, adapter: Path
) -> None:
    reader = open_reader(settings)
    if not isinstance(reader, DatabaseReader):
        pytest.skip("this MLflow's tables are not in KNOWN_SCHEMAS: if the test passes with their revision, add it")
    rejected = {"accepted": False, "reasons": ("Zu viel vergessen: 'π'",), "forgetting": 0.25}
    for number in range(1, 6):
        facts = replace(FACTS, run_key=f"file-{number}", parent_version=str(number - 1) if number > 1 else None)
        register(tracker, registry, adapter, "file", replace(facts, **rejected) if number == 3 else facts)
    registry.client.create_model_version("file", source="elsewhere", run_id=None)  # another program's
    registry.set_alias("file", "champion", "4")
    registry.set_alias("file", "previous", "2")
    registry.client.delete_model_version("file", "5")
    registry.client.create_registered_model("somebody-elses")

    client = MlflowReader(settings)
    for newest in (None, 1, 2, 9):
        assert reader.versions("file", newest=newest) == client.versions("file", newest=newest)
    assert [version.version for version in reader.versions("file")] == ["1", "2", "3", "4"]
    for number in ("1", "3", "5", "6", "7"):
        assert reader.version("file", number) == client.version("file", number)
    for alias in ("champion", "previous", "challenger"):
        assert reader.with_alias("file", alias) == client.with_alias("file", alias)
        assert reader.lineages_with(alias) == client.lineages_with(alias)
    for name in ("file", "somebody-elses", "unknown", "fi%e"):
        assert reader.find_model(name) == client.find_model(name)
        assert reader.versions(name) == client.versions(name)
    for key in ("file-1", "file-5", "unknown"):
        assert reader.find_version(key) == client.find_version(key)


def test_tags_that_people_set_are_no_facts(
    tracker: Tracker, registry: Registry, settings: TrackingSettings, adapter: Path
) -> None:
    before = register(tracker, registry, adapter, "tagged", replace(FACTS, run_key="tagged-1"))
    for name in ("gate", "task", "created", "rollout", "approval", "promoted", "files_sha256", "forgetting"):
        registry.client.set_model_version_tag("tagged", "1", name, "by Ada")
    for reader in (open_reader(settings), MlflowReader(settings)):
        assert reader.versions("tagged") == (before,)


def test_a_registry_that_is_no_known_file_is_read_by_mlflow(
    settings: TrackingSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_registry(settings)
    newer = tmp_path / "newer.db"
    newer.write_bytes((settings.home / "mlflow.db").read_bytes())
    assert isinstance(open_reader(settings.model_copy(update={"tracking_uri": f"sqlite:///{newer}"})), DatabaseReader)
    with closing(sqlite3.connect(newer)) as database, database:
        database.execute("UPDATE alembic_version SET version_num = 'of-another-release'")
    asked: list[str] = []
    monkeypatch.setattr("infra.tracking.mlflow_reader.MlflowReader", lambda found: asked.append(found.tracking_uri))
    addresses = [f"sqlite:///{newer}", f"sqlite:///{tmp_path}/none.db", "http://127.0.0.1:1", "sqlite:///:memory:"]
    for address in addresses:
        open_reader(settings.model_copy(update={"tracking_uri": address}))
    monkeypatch.setenv("MLFLOW_ENABLE_WORKSPACES", "true")
    open_reader(settings)
    assert asked == [*addresses, settings.tracking_uri]
    assert not (tmp_path / "none.db").exists()


def test_a_file_that_cannot_be_read_is_named(settings: TrackingSettings, tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match=r"Cannot search versions at sqlite:///.*/none\.db: unable to open"):
        DatabaseReader(f"sqlite:///{tmp_path}/none.db", tmp_path / "none.db").versions("any")


@pytest.mark.parametrize("opened", [open_tracker, open_reader, open_registry])
def test_a_database_that_cannot_be_read_is_named_at_once(
    opened: Callable[[TrackingSettings], object], settings: TrackingSettings, tmp_path: Path
) -> None:
    """MLflow's client tries a database that fails ten times, for more than a minute."""
    broken = tmp_path / "broken.db"
    broken.write_bytes(b"no database" * 1000)
    with pytest.raises(RegistryError, match=r"broken\.db: file is not a database.*lineage rebuild"):
        opened(settings.model_copy(update={"tracking_uri": f"sqlite:///{broken}"}))
