"""MLflow as a mirror of the store: what it gets, what happens while it is away, and moves of the alias by hand."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from deal_pipeline.server.status import read_status
from flows.forget import forget
from flows.mlflow import sync_mlflow
from infra.mirror_note import waiting
from infra.promotions import PromotionLog
from infra.settings import TrackingSettings
from infra.store import keys
from infra.store.opening import open_store
from infra.tracking.models import ModelRegistry
from infra.tracking.tracker import TrackedRun, Tracker
from infra.versions import Versions
from tasks.lineage.promotion import roll_back
from tasks.mlflow_mirror import WITH_ROWS, Synced, sync_lineage
from tests.adapting import BANK, next_parent, run
from tests.in_process import KilledError, deal, deal_json
from tests.receiver import Receiver
from tests.registering import in_mlflow, mlflow_run, register

pytestmark = pytest.mark.usefixtures("prefect_api")
AWAY = "http://127.0.0.1:9"
"""An address at which nothing answers."""
BY = {"who": "tester", "why": "a test"}


def sync() -> Synced:
    (synced,) = asyncio.run(sync_mlflow(("l",)))
    return synced


def client() -> MlflowClient:
    uri = TrackingSettings().tracking_uri
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def aliases_in_mlflow() -> dict[str, str]:
    """The number in the lineage of the version with each alias."""
    model = client().get_registered_model("l")
    versions = {str(each.version): each.tags["deal.version"] for each in client().search_model_versions("name='l'")}
    return {alias: versions[str(number)] for alias, number in model.aliases.items()}


def move_alias(version: str) -> None:
    """What a person does on MLflow's page."""
    entries = {each.tags["deal.version"]: each.version for each in client().search_model_versions("name='l'")}
    client().set_registered_model_alias("l", "champion", entries[version])


def champion() -> str:
    found = Versions(open_store()).champion("l")
    assert found is not None
    return found.version


def test_mlflow_gets_runs_models_versions_and_aliases(copied_home: Path) -> None:
    assert waiting(open_store(), "l") == () and aliases_in_mlflow() == {
        "champion": "3",
        "previous": "1",
        "challenger": "3",
    }
    for version in Versions(open_store()).all("l"):
        of_run = mlflow_run("l", version.run_key)
        assert of_run.info.run_name == f"{version.task}-v{version.version}"
        assert of_run.info.status == "FINISHED" and of_run.data.tags["deal.version"] == version.version
        metrics = of_run.data.metrics
        assert metrics["average_accuracy"] == version.average_accuracy and "base_accuracy" in metrics
        assert {task: metrics[f"accuracy/{task}"] for task in version.accuracies} == version.accuracies
        assert ("forgetting" in metrics) == (version.version != "1"), "one task forgets nothing: undefined, not zero"
        stages = ("ingest", "base", "train", "evaluate", "gate", "register")
        assert {f"seconds/{stage}" for stage in stages} <= set(metrics) and metrics["rows_per_second/train"] > 0
        assert of_run.data.params["train.max_steps"] == "3" and of_run.data.params["strategy"] == "deal"
        history = client().get_metric_history(of_run.info.run_id, "train/loss")
        assert [point.step for point in history] == [1, 2, 3]
        (dataset,) = of_run.inputs.dataset_inputs
        assert dataset.dataset.digest == version.dataset_sha256[:36]
        (output,) = of_run.outputs.model_outputs
        model = client().get_logged_model(output.model_id)
        assert str(model.status) == "READY" and model.params["train.max_steps"] == "3"
        (score,) = (metric for metric in model.metrics if metric.key == "average_accuracy")
        assert (score.value, score.dataset_name) == (version.average_accuracy, version.task)
        assert {"report.html", "report.json", "evaluation.json"} <= {
            entry.path for entry in client().list_artifacts(of_run.info.run_id)
        }


def test_a_version_is_learned_and_promoted_while_mlflow_is_away_and_written_afterwards(
    copied_home: Path, tiny_base: Path, mlflow_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", AWAY)
    fourth = run(tiny_base, {**BANK, "name": "again"})
    assert (fourth.status, fourth.version, champion()) == ("promoted", "4", "4")
    (status,) = (each for each in asyncio.run(read_status(copied_home)).lineages if each.lineage == "l")
    assert status.mlflow_waiting == ("version 4", "report 4", "move 3")

    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)  # a server that knows nothing of the lineage
    synced = sync()
    assert synced.missing == () and synced.written[-1] == "move 3"
    assert synced.written[:-1] == tuple(f"{what} {number}" for number in "1234" for what in ("version", "report"))
    assert aliases_in_mlflow()["champion"] == "4" and waiting(open_store(), "l") == ()
    history = client().get_metric_history(mlflow_run("l", fourth.run_key).info.run_id, "train/loss")
    assert [point.step for point in history] == [1, 2, 3], "the journal has kept the curve"
    assert sync().written == (), "nothing is written twice"
    assert len(client().search_model_versions("name='l'")) == 4


def test_a_sync_that_is_cut_short_goes_on_and_doubles_nothing(
    copied_home: Path, mlflow_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in copied_home.glob("mlflow.db*"):
        path.unlink()
    shutil.copy(mlflow_database, copied_home / "mlflow.db")
    whole, steps = ModelRegistry.add, []

    def die(registry: ModelRegistry, *args: Any, **options: Any) -> Any:
        steps.append("add")
        if len(steps) == 2:
            raise KilledError
        return whole(registry, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ModelRegistry, "add", die)
        with pytest.raises(KilledError):
            sync_lineage(open_store(), "l")
    assert sync().missing == () and aliases_in_mlflow()["champion"] == "3"
    assert len(client().search_model_versions("name='l'")) == 3
    experiment = client().get_experiment_by_name("deal/l").experiment_id
    assert len(client().search_runs([experiment])) == len(client().search_logged_models([experiment])) == 3


def test_a_version_whose_files_are_damaged_keeps_no_other_out_of_mlflow(
    copied_home: Path, mlflow_database: Path, receiver: Receiver
) -> None:
    for path in copied_home.glob("mlflow.db*"):
        path.unlink()
    shutil.copy(mlflow_database, copied_home / "mlflow.db")
    store, first = open_store(), Versions(open_store()).all("l")[0]
    weights = f"{first.adapter_uri}/adapter_model.safetensors"
    kept = store.get_bytes(weights)
    store.put_bytes(weights, kept[:-1] + b"x")
    synced = sync()
    assert synced.missing == ("version 1", "report 1", "move 2") and "Version 1 of 'l'" in (synced.problem or "")
    assert aliases_in_mlflow() == {"champion": "3", "challenger": "3"}, "previous, version 1, is not there"
    assert sync().set_back is None and receiver.told() == [], "nobody has moved an alias"
    store.put_bytes(weights, kept)
    assert sync().missing == () and aliases_in_mlflow()["previous"] == "1"


def test_an_error_that_nobody_expected_is_returned_and_the_next_call_writes_everything(
    copied_home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    register("fourth")
    with monkeypatch.context() as patch:
        patch.setattr(ModelRegistry, "add", lambda *args, **options: 1 / 0)
        broken = sync_lineage(open_store(), "l")
    assert broken.problem == "ZeroDivisionError: division by zero" and broken.missing[0] == "version 4"
    assert "ZeroDivisionError" in caplog.text
    assert sync().missing == ()


def test_the_command_says_what_it_wrote(copied_home: Path) -> None:
    register("fourth")
    assert deal_json("server", "sync", "l")[0]["written"] == ["version 4", "report 4", "move 2"]
    assert deal("server", "sync") == "l: MLflow lacked nothing.\n"


class TestMovesByHand:
    """A person moves the alias `champion` on MLflow's page."""

    def test_to_a_version_that_continues_the_champion_it_is_a_promotion(
        self, copied_home: Path, receiver: Receiver
    ) -> None:
        register("fourth")
        sync()
        move_alias("4")
        assert sync().promoted == "4" and champion() == "4"
        last = PromotionLog(open_store()).moves("l")[-1]
        assert (last.action, last.before, last.champion, last.who) == ("promoted", "3", "4", "MLflow")
        assert aliases_in_mlflow() == {"champion": "4", "previous": "3", "challenger": "4"}
        assert [notice["event"] for notice in receiver.told()] == ["deal.version.promoted"]

    def test_to_an_earlier_champion_it_is_a_rollback(self, copied_home: Path) -> None:
        move_alias("1")
        assert sync().promoted == "1" and champion() == "1"
        assert (PromotionLog(open_store()).moves("l")[-1].action, aliases_in_mlflow()["previous"]) == (
            "rolled back",
            "3",
        )

    @pytest.mark.parametrize(
        ("version", "changes"),
        [
            ("2", None),  # its gate rejected it
            ("4", {"needs_approval": True}),
            ("4", {"parent_version": "1"}),
            ("4", {"accepted": False, "reasons": ("bank fell by 20 points.",)}),
        ],
    )
    def test_to_a_version_that_no_command_would_promote_it_is_set_back_with_a_notice(
        self, copied_home: Path, receiver: Receiver, version: str, changes: dict[str, Any] | None
    ) -> None:
        if changes is not None:
            register("fourth", **changes)
            sync()
        moves = PromotionLog(open_store()).moves("l")
        move_alias(version)
        synced = sync()
        assert synced.promoted is None and f"version {version}" in (synced.set_back or "")
        assert champion() == "3" == aliases_in_mlflow()["champion"] and PromotionLog(open_store()).moves("l") == moves
        assert [notice["event"] for notice in receiver.told()] == ["deal.alias.set-back"]
        assert sync().set_back is None

    def test_the_log_wins_over_a_move_that_it_has_overtaken(self, copied_home: Path, receiver: Receiver) -> None:
        register("fourth")
        sync()
        move_alias("4")
        roll_back(open_store(), "l", "1", **BY)
        assert "set back to version 1" in (sync().set_back or "")
        assert champion() == "1" == aliases_in_mlflow()["champion"]
        assert [notice["event"] for notice in receiver.told()] == ["deal.alias.set-back"]

    @pytest.mark.parametrize("killed_at", ["set_alias", "tag"])
    @pytest.mark.parametrize("moved_to", ["3", None])
    def test_after_a_kill_between_alias_and_tag_the_log_wins(
        self,
        copied_home: Path,
        receiver: Receiver,
        monkeypatch: pytest.MonkeyPatch,
        killed_at: str,
        moved_to: str | None,
    ) -> None:
        roll_back(open_store(), "l", "1", **BY)
        whole, calls = getattr(ModelRegistry, killed_at), []

        def die_after(registry: ModelRegistry, *args: Any) -> None:
            whole(registry, *args)
            calls.append(args)
            raise KilledError

        with monkeypatch.context() as patch:
            patch.setattr(ModelRegistry, killed_at, die_after)
            with pytest.raises(KilledError):
                sync_lineage(open_store(), "l")
        if moved_to is not None:
            move_alias(moved_to)  # whether this is a person's move or what the write left cannot be told
        assert sync().promoted is None and champion() == "1" == aliases_in_mlflow()["champion"]
        assert PromotionLog(open_store()).moves("l")[-1].action == "rolled back" and len(calls) == 1
        assert receiver.told() == []  # no notice says that a person moved the alias

    def test_the_next_run_continues_the_version_that_was_promoted_by_hand(self, copied_home: Path) -> None:
        move_alias("1")
        parent = next_parent()
        assert parent is not None and parent.version == "1" == champion()
        assert PromotionLog(open_store()).moves("l")[-1].action == "rolled back"


def test_rows_that_are_forgotten_while_mlflow_is_away_are_gone_from_it_after_the_next_sync(
    copied_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *_ = Versions(open_store()).all("l")
    held = in_mlflow("l", first.run_key)
    assert {"report.json", "report.html"} <= {entry.path for entry in held.client.list_artifacts(held.run_id)}
    held.client.delete_run(held.run_id)  # a person; the artifacts stay until MLflow's own gc
    monkeypatch.setenv("MLFLOW_TRACKING_URI", AWAY)
    assert asyncio.run(forget(first.dataset_sha256, reason="asked for")).waits_for_mlflow == ("l",)
    orders = [info.key for info in open_store().list(keys.mlflow_forget_folder("l"))]
    assert keys.mlflow_forget_key("l", first.run_key) in orders
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    steps: list[str] = []
    for owner, name in ((TrackedRun, "remove_files"), (ModelRegistry, "read")):
        whole = getattr(owner, name)

        def note(*args: Any, name: str = name, whole: Any = whole) -> Any:
            steps.append(name)
            return whole(*args)

        monkeypatch.setattr(owner, name, note)
    assert sync().missing == () and steps[0] == "remove_files", "before anything is written"
    runs = Tracker(TrackingSettings()).find_all("l", first.run_key)
    assert held.run_id in {each.run_id for each in runs}, "also the run that a person has deleted"
    for each in runs:
        kept = {entry.path for entry in held.client.list_artifacts(each.run_id)}
        assert not kept & set(WITH_ROWS)
    assert not list(open_store().list(keys.mlflow_forget_folder("l")))
