"""Versions registered without a training, on a copy of the home `three_versions`; and what MLflow has of them."""

from __future__ import annotations

from typing import Any

from mlflow.entities import Run

from infra.settings import TrackingSettings
from infra.store.opening import open_store
from infra.tracking.tracker import TrackedRun, Tracker
from infra.versions import UNREGISTERED, Since, Version, Versions


def register(name: str, **changes: Any) -> Version:
    """Register a version that continues version 3 and passed its gate, as another arrival's run does."""
    versions = Versions(open_store())
    third = versions.find("l", "3")
    assert third is not None
    own = {
        "version": UNREGISTERED,
        "since": Since(),
        "run_key": name,
        "parent_version": "3",
        "dataset_sha256": name,
        "landed_sha256": name,
    }
    return versions.register(third.model_copy(update={**own, **changes}))


def in_mlflow(lineage: str, run_key: str, settings: TrackingSettings | None = None) -> TrackedRun:
    """The MLflow run of an adaptation."""
    run = Tracker(settings or TrackingSettings()).find(lineage, run_key)
    assert run is not None, "MLflow has no such run"
    return run


def mlflow_run(lineage: str, run_key: str, settings: TrackingSettings | None = None) -> Run:
    """What MLflow says of an adaptation's run."""
    tracked = in_mlflow(lineage, run_key, settings)
    return tracked.client.get_run(tracked.run_id)
