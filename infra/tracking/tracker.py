"""MLflow runs and logged models: one run per adaptation. A continued adaptation finds its run by its key.

Everything uses clients with an explicit address. MLflow's global state is not changed.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from time import monotonic
from typing import Any, Literal

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelOutput, Metric, Param, RunTag, ViewType
from mlflow.exceptions import MlflowException
from mlflow.utils.validation import MAX_DATASET_DIGEST_SIZE

from deal_core.errors import ConfigError
from deal_core.safe_text import holds_secret, without_secrets
from infra.settings import TrackingSettings
from infra.tracking.client import open_client, remove_artifacts, report_errors
from infra.tracking.models import RUN_KEY, ModelRegistry

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 1.0
"""The live curve is sent at most this often."""
MAX_PAUSE_SECONDS = 3600.0
"""The longest pause after failed sends."""
MODEL_TYPE = "lora-adapter"
MAX_PARAM_CHARS = 500
ADAPTER_SHA256 = "deal.adapter_sha256"
"""Tag of a logged model: the digest of its adapter."""


class Tracker:
    """Finds and starts the runs of lineages. Each lineage has one experiment, `deal/<lineage>`.

    Raises:
        ConfigError: The address of the artifacts contains a password.
    """

    def __init__(self, settings: TrackingSettings) -> None:
        if holds_secret(settings.artifact_uri):
            raise ConfigError(
                f"DEAL_ARTIFACT_URI is {settings.artifact_uri}: its user, password or token would be kept in MLflow's "
                "database; leave it out, and give credentials as the variables of that kind of store, such as AWS_*."
            )
        self.uri = settings.tracking_uri
        self.artifact_uri = settings.artifact_uri
        self.client = open_client(settings)
        self.models = ModelRegistry(self.client, self.uri)

    def find(self, lineage: str, run_key: str) -> TrackedRun | None:
        """Return the run with `run_key`, if there is one."""
        return next(iter(self.find_all(lineage, run_key, ViewType.ACTIVE_ONLY)), None)

    def find_all(self, lineage: str, run_key: str, view: int = ViewType.ALL) -> list[TrackedRun]:
        """Return all runs with `run_key`, newest first; with `ViewType.ALL` also those that somebody has deleted."""
        with report_errors("find a run", self.uri):
            experiment = self.client.get_experiment_by_name(f"deal/{lineage}")
            return [] if experiment is None else self._runs(str(experiment.experiment_id), run_key, view)

    def _runs(self, experiment_id: str, run_key: str, view: int) -> list[TrackedRun]:
        runs = self.client.search_runs([experiment_id], f"tags.`{RUN_KEY}` = '{run_key}'", view)
        return [TrackedRun(self.client, run.info.run_id) for run in runs]

    def start(
        self,
        lineage: str,
        run_key: str,
        *,
        name: str,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> TrackedRun:
        """Return the run with `run_key`; start it if it does not exist.

        MLflow's pages show `name`. `params` may be nested; existing parameters of the run are kept. `tags` replace
        existing tags.
        """
        with report_errors("start a run", self.uri):
            experiment = self.client.get_experiment_by_name(f"deal/{lineage}")
            if experiment is None:
                is_server = self.uri.startswith(("http://", "https://"))  # a server has its own place for artifacts
                location = None if is_server else f"{self.artifact_uri.rstrip('/')}/{lineage}"
                experiment_id = str(self.client.create_experiment(f"deal/{lineage}", artifact_location=location))
            else:
                experiment_id = str(experiment.experiment_id)
                if experiment.lifecycle_stage != "active":  # somebody has deleted it
                    self.client.restore_experiment(experiment_id)
            run = next(iter(self._runs(experiment_id, run_key, ViewType.ACTIVE_ONLY)), None)
            if run is None:
                own = {RUN_KEY: run_key, "deal.lineage": lineage}
                made = self.client.create_run(experiment_id, tags=own, run_name=name)
                run = TrackedRun(self.client, made.info.run_id)
            else:
                self.client.update_run(run.run_id, status="RUNNING")
        run.log_params(params or {})
        run.set_tags(tags or {})
        return run


class TrackedRun:
    """A run."""

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self.client = client
        self.run_id = run_id
        self._curve: list[Metric] = []
        """Points that wait. An earlier process may have logged them already."""
        self._last_steps: dict[str, int] = {}
        """The last step that was logged of each curve."""
        self._pause = FLUSH_SECONDS
        self._next_send = 0.0

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add points to live curves, in order of steps. Steps that an earlier process has logged are skipped.

        Points are sent about once a second and by `flush` and `end`. If the server does not answer, training continues
        and the points wait. A failed send may take minutes, because MLflow repeats it; the pause after it is as long as
        the send, and doubles with each further failed send.
        """
        self.add(step, metrics)
        began = monotonic()
        if began < self._next_send:
            return
        try:
            self._send()
            self._pause = FLUSH_SECONDS
        except MlflowException as error:
            self._pause = min(max(2 * self._pause, monotonic() - began), MAX_PAUSE_SECONDS)
            where, reason = self.client.tracking_uri, str(error).split("\n")[0]
            logger.warning(
                "Metrics wait for MLflow at %s, the next try is in %.0f s: %s",
                without_secrets(where),
                self._pause,
                without_secrets(reason),
            )
        self._next_send = monotonic() + self._pause

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add points to curves without sending them; `flush` and `end` do. Steps that were logged are skipped."""
        self._curve += _points(metrics, step)

    def flush(self) -> None:
        """Send the waiting points; raise RegistryError if MLflow does not accept them."""
        with self._report_errors("log metrics"):
            self._send()

    def log_metrics(self, metrics: Mapping[str, float | None], step: int = 0) -> None:
        """Log results. Undefined results, which are None, are skipped."""
        with self._report_errors("log metrics"):
            self.client.log_batch(self.run_id, metrics=_points(metrics, step))

    def log_stage(self, stage: str, seconds: float, num_rows: int | None = None) -> None:
        """Log a stage's wall time, and its rows per second if the number of rows is known."""
        rate = num_rows / seconds if num_rows is not None and seconds > 0 else None
        self.log_metrics({f"seconds/{stage}": seconds, f"rows_per_second/{stage}": rate})

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log settings; nested settings get dotted names. Existing parameters of the run are kept."""
        flat = dict(_flatten(params))
        with self._report_errors("log parameters"):
            kept = self.client.get_run(self.run_id).data.params if flat else {}
            new = [Param(key, value) for key, value in flat.items() if key not in kept]
            self.client.log_batch(self.run_id, params=new)
        for key, value in flat.items():
            if kept.get(key, value) != value:
                logger.warning("Run %s keeps %s = %s; now it is %s.", self.run_id, key, kept[key], value)

    def rename(self, name: str) -> None:
        """Let MLflow's pages show another name."""
        with self._report_errors("rename a run"):
            self.client.update_run(self.run_id, name=name)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags, or replace their values."""
        with self._report_errors("set tags"):
            self.client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def log_dataset(self, name: str, sha256: str, uri: str, counts: Mapping[str, int]) -> None:
        """Log a task's dataset as the run's input: its digest, its address in the store and its numbers of rows.

        MLflow's digest field has the first 36 characters of the digest, and a tag has all.
        """
        dataset = Dataset(
            name=name,
            digest=sha256[:MAX_DATASET_DIGEST_SIZE],
            source_type="s3" if uri.startswith("s3://") else "local",
            source=json.dumps({"uri": uri}),
            profile=json.dumps(dict(counts)),
        )
        tags = [InputTag("mlflow.data.context", "training"), InputTag("deal.dataset_sha256", sha256)]
        with self._report_errors("log the dataset"):
            self.client.log_inputs(self.run_id, datasets=[DatasetInput(dataset, tags)])

    def log_json(self, file: str, value: Any) -> None:
        """Log a value as a JSON artifact, for example `evaluation.json`."""
        self.log_text(file, json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False))

    def log_text(self, file: str, text: str) -> None:
        """Log a text as an artifact, for example `report.html`."""
        with self._report_errors("keep an artifact"):
            self.client.log_text(self.run_id, text, file)

    def log_adapter(
        self,
        folder: Path | None,
        name: str,
        *,
        sha256: str,
        params: Mapping[str, Any],
        metrics: Mapping[str, float | None],
        dataset: str,
        dataset_sha256: str,
    ) -> str:
        """Log an adapter as a logged model of the run, with its settings and its scores; return the model's id.

        A continued run completes or returns its logged model of the same adapter. A run that was trained again on
        another machine may have a logged model of another adapter. Characters that MLflow refuses are replaced.

        Args:
            folder: The folder that MLflow serves; None: the adapter was removed, so the model has no files.
            name: Name of the model.
            sha256: Digest of the adapter.
            params: Settings; nested ones get dotted names.
            metrics: Scores. Undefined ones, which are None, are left out.
            dataset: Name of the dataset that the scores belong to.
            dataset_sha256: Its digest.
        """
        with self._report_errors("keep the adapter"):
            run = self.client.get_run(self.run_id)
            own = f"source_run_id = '{self.run_id}' AND tags.`{ADAPTER_SHA256}` = '{sha256}'"
            models = self.client.search_logged_models([run.info.experiment_id], own, max_results=1)
            model = next(iter(models), None) or self.client.create_logged_model(
                run.info.experiment_id,
                name=re.sub(r"[^A-Za-z0-9_-]", "-", name),
                source_run_id=self.run_id,
                tags={RUN_KEY: run.data.tags[RUN_KEY], ADAPTER_SHA256: sha256},
                params={key: value[:MAX_PARAM_CHARS] for key, value in _flatten(params)},
                model_type=MODEL_TYPE,
            )
            model_id = str(model.model_id)
            if str(model.status) != "READY":  # otherwise an earlier process has completed it
                if folder is not None:
                    self.client.log_model_artifacts(model_id, str(folder))
                digest = dataset_sha256[:MAX_DATASET_DIGEST_SIZE]
                points = _points(metrics, 0, model_id=model_id, dataset_name=dataset, dataset_digest=digest)
                self.client.log_batch(self.run_id, metrics=points)
                self.client.finalize_logged_model(model_id, "READY")
            outputs = run.outputs.model_outputs if run.outputs else []
            if model_id not in [output.model_id for output in outputs]:
                self.client.log_outputs(self.run_id, [LoggedModelOutput(model_id, step=0)])
        return model_id

    def remove_files(self, names: Collection[str]) -> None:
        """Remove those of the named artifacts that the run has. Can be repeated."""
        with self._report_errors("remove artifacts"):
            present = {file.path for file in self.client.list_artifacts(self.run_id)}
            location = str(self.client.get_run(self.run_id).info.artifact_uri)
            remove_artifacts(self.client, location, present & {*names})

    def end(self, status: Literal["FINISHED", "FAILED"] = "FINISHED") -> None:
        """Send the waiting points and end the run."""
        try:
            self.flush()
        finally:
            with self._report_errors("end the run"):
                self.client.set_terminated(self.run_id, status)

    def _send(self) -> None:
        """Send those of the waiting points that nobody has logged."""
        for key in {point.key for point in self._curve} - self._last_steps.keys():
            history = self.client.get_metric_history(self.run_id, key)
            self._last_steps[key] = max((point.step for point in history), default=-1)
        new = [point for point in self._curve if point.step > self._last_steps[point.key]]
        if new:
            self.client.log_batch(self.run_id, metrics=new)
        self._last_steps |= {point.key: point.step for point in new}
        self._curve = []

    def _report_errors(self, action: str) -> AbstractContextManager[None]:
        return report_errors(f"{action} of run {self.run_id}", self.client.tracking_uri)


def _points(metrics: Mapping[str, float | None], step: int, **origin: str) -> list[Metric]:
    """Points of now, without those that have no value. `origin` names the logged model and the dataset."""
    now = int(time.time() * 1000)
    return [Metric(key, float(value), now, step, **origin) for key, value in metrics.items() if value is not None]


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, str(value)
