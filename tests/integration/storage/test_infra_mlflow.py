"""Runs and versions in a real MLflow on SQLite. Every test has its own lineages."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import mlflow
import pytest
from mlflow.exceptions import MlflowException

from deal_core.errors import RegistryError
from infra.settings import TrackingSettings
from infra.tracking.client import require_answer
from infra.tracking.models import Entry
from infra.tracking.tracker import TrackedRun, Tracker


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> TrackingSettings:
    home = tmp_path_factory.mktemp("mlflow") / "deal home"
    return TrackingSettings(
        home=home, tracking_uri=f"sqlite:///{home}/mlflow.db", artifact_uri=(home / "mlflow-artifacts").as_uri()
    )


@pytest.fixture
def tracker(settings: TrackingSettings) -> Tracker:
    return Tracker(settings)


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


def log_adapter(run: TrackedRun, adapter: Path | None, *, name: str = "billing", sha256: str = "a" * 64) -> str:
    """Log an adapter as the mirror does."""
    return run.log_adapter(
        adapter,
        name,
        sha256=sha256,
        params={"strategy": "deal", "train": {"learning_rate": 5e-4}},
        metrics={"average_accuracy": 0.75, "forgetting": None},
        dataset="billing",
        dataset_sha256="f" * 64,
    )


def again(tracker: Tracker, run: TrackedRun) -> TrackedRun:
    """The run as another process has it."""
    return TrackedRun(tracker.client, run.run_id)


def points(run: TrackedRun, key: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in run.client.get_metric_history(run.run_id, key)]


def test_a_killed_run_is_continued_and_nothing_is_doubled(tracker: Tracker, settings: TrackingSettings) -> None:
    killed = tracker.start("killed", "k", name="billing", params={"a": 1, "b": 2})
    for step in (1, 2, 3):
        killed.log(step, {"loss": float(step)})
    killed.flush()
    del killed

    other = tracker.start("killed", "another", name="billing")
    run = Tracker(settings).start("killed", "k", name="billing", params={"a": 1, "b": 3, "c": 4})
    assert tracker.client.get_run(run.run_id).info.status == "RUNNING"
    for step in (2, 3, 4):
        run.log(step, {"loss": 10.0 * step, "late": 1.0})
    for _ in range(2):
        run.log_dataset("billing", "f" * 64, "file:///x", {})
    run.end()
    assert run.run_id != other.run_id
    assert points(run, "loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    assert points(run, "late") == [(2, 1.0), (3, 1.0), (4, 1.0)]
    found = tracker.client.get_run(run.run_id)
    assert found.data.params == {"a": "1", "b": "2", "c": "4"}
    assert len(found.inputs.dataset_inputs) == 1
    assert found.info.status == "FINISHED"
    other.end()


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
    run = tracker.start("many", "k", name="x", params={f"p{number:03d}": number for number in range(250)})
    for step in range(1200):
        run.log(step, {"loss": 1.0})
    run.end()
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
            log_adapter(run, adapter, sha256="a" * 64)
    model_id = log_adapter(again(tracker, run), adapter, sha256="a" * 64)
    assert log_adapter(again(tracker, run), adapter, sha256="a" * 64) == model_id
    experiment = tracker.client.get_run(run.run_id).info.experiment_id
    assert [model.model_id for model in tracker.client.search_logged_models([experiment])] == [model_id]
    assert str(tracker.client.get_logged_model(model_id).status) == "READY"
    assert len(tracker.client.list_logged_model_artifacts(model_id)) == 2
    run.end()


def test_an_adapter_that_was_trained_anew_is_not_taken_for_the_one_that_is_kept(
    tracker: Tracker, adapter: Path
) -> None:
    run = tracker.start("anew", "k", name="x")
    first = log_adapter(run, adapter, sha256="a" * 64)
    (adapter / "adapter_model.safetensors").write_bytes(b"\x00others")
    second = log_adapter(again(tracker, run), adapter, sha256="b" * 64)
    for model_id, digest, weights in ((first, "a" * 64, b"\x00weights"), (second, "b" * 64, b"\x00others")):
        model = tracker.client.get_logged_model(model_id)
        assert model.tags["deal.adapter_sha256"] == digest
        kept = Path(model.artifact_location.removeprefix("file://").replace("%20", " ")) / "adapter_model.safetensors"
        assert kept.read_bytes() == weights
    assert log_adapter(again(tracker, run), adapter, sha256="b" * 64) == second
    run.end()


def test_artifacts_go_where_the_setting_says(settings: TrackingSettings, tmp_path: Path) -> None:
    moved = settings.model_copy(update={"artifact_uri": (tmp_path / "there").as_uri()})
    run = Tracker(moved).start("moved", "k", name="x")
    run.log_json("a.json", {})
    run.end()
    assert len(list((tmp_path / "there" / "moved").rglob("a.json"))) == 1


def test_an_experiment_that_was_deleted_comes_back(tracker: Tracker) -> None:
    first = tracker.start("deleted", "k", name="x")
    first.end()
    experiment = tracker.client.get_run(first.run_id).info.experiment_id
    tracker.client.delete_experiment(experiment)
    run = tracker.start("deleted", "k2", name="x")
    assert tracker.client.get_run(run.run_id).info.experiment_id == experiment
    run.end()


def test_an_address_that_does_not_answer_is_said_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    settings = TrackingSettings.model_validate({"tracking_uri": "http://somebody:hidden@127.0.0.1:9"})
    with pytest.raises(RegistryError, match=r"127\.0\.0\.1:9.*MLFLOW_TRACKING_URI") as caught:
        Tracker(settings).start("base", "k", name="x")
    assert "hidden" not in "".join(traceback.format_exception(caught.value)), "nor where a log shows the causes"


def entry_of(tracker: Tracker, run: TrackedRun, adapter: Path, lineage: str, version: str) -> Entry:
    """An entry for a version, with its logged model."""
    tracker.models.read(lineage)  # makes the registered model
    model_id = log_adapter(run, adapter)
    return tracker.models.add(lineage, version, run_id=run.run_id, model_id=model_id, tags={}, description="x")


def test_the_tag_alone_says_which_version_an_entry_is_and_the_oldest_of_two_counts(
    tracker: Tracker, adapter: Path
) -> None:
    run = tracker.start("doubled", "k", name="x")
    made = [entry_of(tracker, run, adapter, "doubled", version) for version in ("3", "3", "5")]
    run.end()
    assert [entry.mlflow_number for entry in made] == ["1", "2", "3"]
    tracker.models.set_alias("doubled", "champion", made[0])
    tracker.models.set_alias("doubled", "previous", made[1])
    found = tracker.models.read("doubled")
    assert {number: entry.mlflow_number for number, entry in found.entries.items()} == {"3": "1", "5": "3"}
    assert (found.number_of("champion"), found.number_of("previous"), found.number_of("rollout")) == ("3", None, None)
    shown = tracker.client.get_logged_model(made[0].model_id).tags["mlflow.modelVersions"]
    assert json.loads(shown)[0]["name"] == "doubled"


def test_a_registered_model_of_somebody_else_is_left_alone(tracker: Tracker) -> None:
    tracker.client.create_registered_model("theirs")
    with pytest.raises(RegistryError, match=r"'theirs' that is no lineage"):
        tracker.models.read("theirs")


def test_all_entries_come_however_many_there_are(
    tracker: Tracker, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infra.tracking.models.PAGE", 4)
    run = tracker.start("pages", "k", name="x")
    for number in range(1, 12):
        entry_of(tracker, run, adapter, "pages", str(number))
    run.end()
    assert sorted(tracker.models.read("pages").entries, key=int) == [str(number) for number in range(1, 12)]


def test_a_server_that_does_not_answer_is_known_at_once(free_port: int) -> None:
    with pytest.raises(RegistryError, match=r"127\.0\.0\.1:\d+ does not answer"):
        require_answer(f"http://somebody:hidden@127.0.0.1:{free_port}")


def test_a_database_that_cannot_be_read_is_named_at_once(settings: TrackingSettings, tmp_path: Path) -> None:
    """MLflow's client tries a database that fails ten times, for more than a minute."""
    broken = tmp_path / "broken.db"
    broken.write_bytes(b"no database" * 1000)
    with pytest.raises(RegistryError, match=r"broken\.db: file is not a database.*deal server sync"):
        Tracker(settings.model_copy(update={"tracking_uri": f"sqlite:///{broken}"}))
