"""The same code with an MLflow server over HTTP, which stores the artifacts."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra.settings import TrackingSettings
from infra.tracking.tracker import Tracker


@pytest.mark.nightly
def test_a_run_and_its_version_over_http(mlflow_server: str, tmp_path: Path) -> None:
    settings = TrackingSettings.model_validate({"home": tmp_path / "home", "tracking_uri": mlflow_server})
    tracker = Tracker(settings)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    params = {f"p{number:03d}": number for number in range(150)}  # more than the server accepts in one request
    tracker.models.read("base")
    for _ in range(2):  # the process died just before the end
        run = tracker.start("base", "key", name="billing", params=params)
        for step in range(1500):
            run.log(step, {"loss": 1.0})
        run.log_dataset("billing", "f" * 64, "file:///x", {"num_train": 1})
        model_id = run.log_adapter(
            adapter, "billing", sha256="a", params=params, metrics={}, dataset="billing", dataset_sha256="f" * 64
        )
        if "1" not in tracker.models.read("base").entries:
            tracker.models.add("base", "1", run_id=run.run_id, model_id=model_id, tags={}, description="x")
        run.end()
    registered = tracker.models.read("base")
    tracker.models.set_alias("base", "champion", registered.entries["1"])
    assert tracker.models.read("base").number_of("champion") == "1"
    assert registered.entries["1"].model_id == model_id
    found = tracker.client.get_run(run.run_id)
    assert (found.info.status, found.data.metrics, len(found.inputs.dataset_inputs)) == ("FINISHED", {"loss": 1.0}, 1)
    assert len(found.data.params) == 150
    assert len(tracker.client.get_metric_history(run.run_id, "loss")) == 1500
    assert [item.path for item in tracker.client.list_logged_model_artifacts(model_id)] == ["adapter_config.json"]
    assert list((tmp_path / "server" / "artifacts").rglob("adapter_config.json"))
    assert not (tmp_path / "home").exists()
