"""The same code with an MLflow server over HTTP, which stores the artifacts."""

from __future__ import annotations

from pathlib import Path

from infra.tracking.facts import VersionFacts
from infra.tracking.registry import open_registry

from infra.settings import TrackingSettings
from infra.tracking.tracker import open_tracker


def test_a_run_and_its_version_over_http(mlflow_server: str, tmp_path: Path) -> None:
    settings = TrackingSettings.model_validate({"home": tmp_path / "home", "tracking_uri": mlflow_server})
    tracker, registry = open_tracker(settings), open_registry(settings)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    facts = VersionFacts(
        run_key="key",
        task="billing",
        strategy="deal",
        base_sha256="b",
        dataset_sha256="d",
        config_sha256="c",
        adapter_uri="adapters/base/key",
        adapter_sha256="a",
        files_sha256={},
        landed_sha256="e" * 64,
        train_seconds=1.0,
        parent_version=None,
        accepted=True,
        reasons=(),
        average_accuracy=0.5,
        forgetting=None,
        backward_transfer=None,
        forward_transfer=None,
    )
    params = {f"p{number:03d}": number for number in range(150)}  # more than the server accepts in one request
    for _ in range(2):  # the process died just before the end
        with tracker.start("base", "key", name="billing", params=params) as run:
            for step in range(1500):
                run.log(step, {"loss": 1.0})
            run.log_dataset("billing", "f" * 64, "file:///x", {"num_train": 1})
            model_id = run.log_adapter(adapter, "billing", sha256=facts.adapter_sha256)
            version = registry.register("base", facts, tracking_id=run.run_id, model_id=model_id)
    registry.set_alias("base", "champion", version.version)

    champion = registry.champion("base")
    assert champion is not None
    assert registry.versions("base") == (champion,) == (registry.find_version("key"),)
    assert (champion.tracking_id, champion.model_id, champion.aliases) == (run.run_id, model_id, ("champion",))
    found = tracker.client.get_run(run.run_id)
    assert (found.info.status, found.data.metrics, len(found.inputs.dataset_inputs)) == ("FINISHED", {"loss": 1.0}, 1)
    assert len(found.data.params) == 150
    assert len(tracker.client.get_metric_history(run.run_id, "loss")) == 1500
    assert [item.path for item in tracker.client.list_logged_model_artifacts(model_id)] == ["adapter_config.json"]
    assert list((tmp_path / "server" / "artifacts").rglob("adapter_config.json"))
    assert not (tmp_path / "home").exists()
