"""MLflow runs: one per adaptation, found again by its key when it is continued, and always ended.

Everything goes through clients with an explicit address; MLflow's global state is left as it is.

Example:
    >>> tracker = open_tracker()  # doctest: +SKIP
    >>> with tracker.start("base", run_key, name="billing", params={"strategy": "deal"}) as run:  # doctest: +SKIP
    ...     run.log(1, {"loss": 2.3})
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from matplotlib.figure import Figure
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelOutput, Metric, Param, ViewType
from mlflow.exceptions import MlflowException
from mlflow.utils.validation import MAX_DATASET_DIGEST_SIZE, MAX_METRICS_PER_BATCH, MAX_PARAMS_TAGS_PER_BATCH
from sqlalchemy.exc import SQLAlchemyError

from deal_core.errors import RegistryError
from infra.settings import TrackingSettings

logger = logging.getLogger(__name__)

RUN_KEY = "deal.run_key"
FLUSH_SECONDS = 1.0
"""The live curve is sent at most this often."""
MODEL_TYPE = "lora-adapter"


def open_client(settings: TrackingSettings) -> MlflowClient:
    """A client of the tracking server or database; the folder of an SQLite file is made.

    Raises:
        RegistryError: nothing answers at the address.
    """
    uri = settings.tracking_uri
    with saying("open MLflow", uri):
        if uri.startswith("sqlite:///"):
            Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        return MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextmanager
def saying(doing: str, uri: str) -> Iterator[None]:
    """Turn MLflow's errors into one that says what failed, and where."""
    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError, ImportError) as error:
        reason = _without_password(str(error).strip().split("\n")[0].rstrip("."))
        where = _without_password(uri)
        raise RegistryError(f"Cannot {doing} at {where}: {reason}; check MLFLOW_TRACKING_URI.") from error


def _without_password(text: str) -> str:
    return re.sub(r"://[^/@\s]*@", "://***@", text)


def open_tracker(settings: TrackingSettings | None = None) -> Tracker:
    """A tracker as the environment, or `settings`, describes it."""
    return Tracker(settings or TrackingSettings())


class Tracker:
    """Finds and starts the runs of lineages; each lineage has one experiment, `deal/<lineage>`."""

    def __init__(self, settings: TrackingSettings) -> None:
        self.uri = settings.tracking_uri
        self.artifact_uri = settings.artifact_uri
        self.client = open_client(settings)

    def start(
        self,
        lineage: str,
        run_key: str,
        *,
        name: str,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> TrackedRun:
        """The run of an adaptation: a new one, or the one that `run_key` was started with before.

        Args:
            lineage: whose run it is.
            run_key: identity of the adaptation.
            name: what people see.
            params: settings, nested as they come; those that the run has already are left as they are.
            tags: set anew each time.
        """
        with saying("start a run", self.uri):
            experiment_id = self._experiment(lineage)
            own_run = f"tags.`{RUN_KEY}` = '{run_key}'"
            found = self.client.search_runs([experiment_id], own_run, ViewType.ACTIVE_ONLY, max_results=1)
            if found:
                run_id = found[0].info.run_id
                self.client.update_run(run_id, status="RUNNING")
            else:
                own = {RUN_KEY: run_key, "deal.lineage": lineage}
                run_id = self.client.create_run(experiment_id, tags=own, run_name=name).info.run_id
        run = TrackedRun(self.client, run_id)
        run.log_params(params or {})
        run.set_tags(tags or {})
        return run

    def run(self, run_id: str) -> TrackedRun:
        """A run that was started before, by its id."""
        return TrackedRun(self.client, run_id)

    def _experiment(self, lineage: str) -> str:
        name = f"deal/{lineage}"
        for _ in range(2):
            experiment = self.client.get_experiment_by_name(name)
            if experiment is not None:
                if experiment.lifecycle_stage != "active":
                    self.client.restore_experiment(experiment.experiment_id)
                return str(experiment.experiment_id)
            try:
                return str(self.client.create_experiment(name, artifact_location=self._artifact_location(lineage)))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":  # else another process was first
                    raise
        raise RegistryError(f"MLflow at {self.uri} neither finds nor makes the experiment {name!r}; look into its UI.")

    def _artifact_location(self, lineage: str) -> str | None:
        """Where a database's artifacts go (MLflow's default is the working directory); None: the server decides."""
        is_server = self.uri.startswith(("http://", "https://"))
        return None if is_server else f"{self.artifact_uri.rstrip('/')}/{lineage}"


class TrackedRun:
    """One run, to which things are logged. As a context manager it owns the run's end: FINISHED, or FAILED."""

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self.client = client
        self.run_id = run_id
        self._waiting: list[Metric] = []
        self._last_steps: dict[str, int] = {}
        self._flushed_at = 0.0

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add points to live curves, in order of steps; a step that an earlier process has logged is left out.

        Points are sent about once a second and by `flush` and `end`. A server that is away for a while does not stop
        the training: points wait until it is back.
        """
        now = int(time.time() * 1000)
        try:
            for key, value in metrics.items():
                if step > self._last_step(key):
                    self._waiting.append(Metric(key, float(value), now, step))
                    self._last_steps[key] = step
            if time.monotonic() - self._flushed_at >= FLUSH_SECONDS:
                self._flushed_at = time.monotonic()
                self._send()
        except MlflowException as error:
            logger.warning("Metrics wait for MLflow at %s: %s", self.client.tracking_uri, str(error).split("\n")[0])

    def flush(self) -> None:
        """Send the points that wait.

        Raises:
            RegistryError: MLflow does not take them.
        """
        with self._saying("log metrics"):
            self._send()

    def log_metrics(self, metrics: Mapping[str, float | None], step: int = 0) -> None:
        """Log results; None, an undefined one, is left out."""
        now = int(time.time() * 1000)
        self._waiting += [Metric(key, float(value), now, step) for key, value in metrics.items() if value is not None]
        self.flush()

    def log_stage(self, stage: str, seconds: float, num_rows: int | None = None) -> None:
        """Log a stage's wall time and, if it works on rows, its rows per second."""
        rate = num_rows / seconds if num_rows is not None and seconds > 0 else None
        self.log_metrics({f"seconds/{stage}": seconds, f"rows_per_second/{stage}": rate})

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log settings, nested ones under dotted names; those that the run has already are left as they are."""
        flat = dict(_flatten(params))
        with self._saying("log parameters"):
            known = self.client.get_run(self.run_id).data.params if flat else {}
            new = [Param(key, value) for key, value in flat.items() if key not in known]
            for start in range(0, len(new), MAX_PARAMS_TAGS_PER_BATCH):
                self.client.log_batch(self.run_id, params=new[start : start + MAX_PARAMS_TAGS_PER_BATCH])
        for key in flat.keys() & known.keys():
            if known[key] != flat[key]:
                logger.warning("Run %s keeps %s = %s; now it is %s.", self.run_id, key, known[key], flat[key])

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags; a later value replaces an earlier one."""
        with self._saying("set tags"):
            for key, value in tags.items():
                self.client.set_tag(self.run_id, key, value)

    def log_dataset(
        self, name: str, sha256: str, uri: str, counts: Mapping[str, int], *, context: str = "training"
    ) -> None:
        """Log a dataset as the run's input: where it is and what it hashes to, none of its rows.

        Args:
            name: the task's name.
            sha256: of the dataset; MLflow's digest field takes the first 36 characters, a tag has all.
            uri: full address in the store.
            counts: numbers of rows by kind.
            context: "training" or "evaluation".
        """
        dataset = Dataset(
            name=name,
            digest=sha256[:MAX_DATASET_DIGEST_SIZE],
            source_type="s3" if uri.startswith("s3://") else "local",
            source=json.dumps({"uri": uri}),
            profile=json.dumps(dict(counts)),
        )
        tags = [InputTag("mlflow.data.context", context), InputTag("deal.dataset_sha256", sha256)]
        with self._saying("log the dataset"):
            self.client.log_inputs(self.run_id, datasets=[DatasetInput(dataset, tags)])

    def log_figure(self, name: str, figure: Figure) -> None:
        """Keep a figure as figures/<name>.png."""
        with self._saying("keep a figure"):
            self.client.log_figure(self.run_id, figure, f"figures/{name}.png", save_kwargs={"dpi": 150})

    def log_json(self, file: str, value: Any) -> None:
        """Keep a JSON-able value as an artifact, for example `evaluation.json`."""
        with self._saying("keep an artifact"):
            self.client.log_text(self.run_id, json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False), file)

    def log_adapter(self, folder: Path, name: str, *, params: Mapping[str, Any] | None = None) -> str:
        """Keep the adapter's folder as the run's logged model.

        Called again, by a run that is continued, it completes or returns the model that is there.

        Args:
            folder: a plain PEFT folder.
            name: what people see; characters that MLflow refuses are replaced.
            params: settings to show beside the model.

        Returns:
            The model's id, for `Registry.register`.
        """
        with self._saying("keep the adapter"):
            run = self.client.get_run(self.run_id)
            model = self._logged_model(run.info.experiment_id)
            if model is None:
                flat = dict(_flatten(params or {}))
                model = self.client.create_logged_model(
                    run.info.experiment_id,
                    name=re.sub(r"[^A-Za-z0-9_-]", "-", name),
                    source_run_id=self.run_id,
                    tags={RUN_KEY: run.data.tags[RUN_KEY]},
                    params=flat,
                    model_type=MODEL_TYPE,
                )
            model_id = str(model.model_id)
            if str(model.status) != "READY":
                self.client.log_model_artifacts(model_id, str(folder))
                self.client.finalize_logged_model(model_id, "READY")
            outputs = run.outputs.model_outputs if run.outputs else []
            if model_id not in [output.model_id for output in outputs]:
                self.client.log_outputs(self.run_id, [LoggedModelOutput(model_id, step=0)])
        return model_id

    def end(self, status: Literal["FINISHED", "FAILED"] = "FINISHED") -> None:
        """Send what waits and end the run."""
        try:
            self.flush()
        finally:
            with self._saying("end the run"):
                self.client.set_terminated(self.run_id, status)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.end("FINISHED")
            return
        try:  # an end that fails must not hide why the run did
            self.set_tags({"deal.error": kind.__name__})
            self.end("FAILED")
        except RegistryError as second:
            logger.warning("%s", second)

    def _send(self) -> None:
        while self._waiting:
            batch = self._waiting[:MAX_METRICS_PER_BATCH]
            self.client.log_batch(self.run_id, metrics=batch)
            del self._waiting[: len(batch)]

    def _last_step(self, key: str) -> int:
        if key not in self._last_steps:
            history = self.client.get_metric_history(self.run_id, key)
            self._last_steps[key] = max((point.step for point in history), default=-1)
        return self._last_steps[key]

    def _logged_model(self, experiment_id: str) -> Any:
        found = self.client.search_logged_models([experiment_id], f"source_run_id = '{self.run_id}'", max_results=1)
        return found[0] if found else None

    def _saying(self, doing: str) -> Any:
        return saying(f"{doing} of run {self.run_id}", self.client.tracking_uri)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, str(value)
