"""What is logged to one MLflow run."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any, Literal, Self

from matplotlib.figure import Figure
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModel, LoggedModelOutput, Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.utils.validation import MAX_DATASET_DIGEST_SIZE

from deal_core.adapter.files import digests_of
from deal_core.errors import RegistryError
from deal_core.masking import without_secrets
from infra.store.base import temporary_folder
from infra.tracking.client import FILES_SHA256, RUN_KEY, saying

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 1.0
"""The live curve is sent at most this often."""
MAX_PAUSE_SECONDS = 3600.0
"""After sends that failed the next one is tried so late at the latest."""
MODEL_TYPE = "lora-adapter"
ADAPTER_SHA256 = "deal.adapter_sha256"
"""Tag of a logged model: which adapter it holds."""


class TrackedRun:
    """One run, to which things are logged. As a context manager it owns the run's end: FINISHED, or FAILED."""

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self.client = client
        self.run_id = run_id
        self._curve: list[Metric] = []
        """Points of which it is not known yet whether an earlier process has logged them."""
        self._waiting: list[Metric] = []
        self._last_steps: dict[str, int] = {}
        self._pause = FLUSH_SECONDS
        self._next_send = 0.0

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add points to live curves, in order of steps; a step that an earlier process has logged is left out.

        Points are sent about once a second and by `flush` and `end`. A server that is away does not stop the training:
        points wait until it is back. A send that fails may take minutes, as MLflow tries again by itself; the pause
        after it is as long as the send was, and doubles with each further one that fails.
        """
        now = int(time.time() * 1000)
        self._curve += [Metric(key, float(value), now, step) for key, value in metrics.items()]
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
                without_secrets(where), self._pause, without_secrets(reason),
            )  # fmt: skip
        self._next_send = monotonic() + self._pause

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
            self.client.log_batch(self.run_id, params=new)
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
        self.log_text(file, json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False))

    def log_text(self, file: str, text: str) -> None:
        """Keep a text as an artifact, for example `report.html`."""
        with self._saying("keep an artifact"):
            self.client.log_text(self.run_id, text, file)

    def read_json(self, file: str) -> Any:
        """What `log_json` kept.

        Raises:
            RegistryError: the run has no such artifact, or it cannot be read.
        """
        with self._saying(f"read {file}"), temporary_folder() as folder:
            if file not in {entry.path for entry in self.client.list_artifacts(self.run_id)}:
                raise RegistryError(f"Run {self.run_id} has no {file}; it was not finished, or an earlier release "
                                    "made it.")  # fmt: skip
            path = Path(self.client.download_artifacts(self.run_id, file, str(folder)))
            try:
                return json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                raise RegistryError(f"{file} of run {self.run_id} is damaged; it is no JSON.") from None

    def log_adapter(
        self, folder: Path, name: str, *, sha256: str, params: Mapping[str, Any] | None = None
    ) -> str:
        """Keep the adapter's folder as a logged model of the run.

        Called again, by a run that is continued, it completes or returns the model that is there, if that is of the
        same adapter: trained anew on another machine, the same run may have made another.

        Args:
            folder: a plain PEFT folder.
            name: what people see; characters that MLflow refuses are replaced.
            sha256: digest of the adapter.
            params: settings to show beside the model.

        Returns:
            The model's id, for `Registry.register`.
        """
        with self._saying("keep the adapter"):
            run = self.client.get_run(self.run_id)
            model = self._logged_model(run.info.experiment_id, sha256)
            if model is None:
                flat = dict(_flatten(params or {}))
                model = self.client.create_logged_model(
                    run.info.experiment_id,
                    name=re.sub(r"[^A-Za-z0-9_-]", "-", name),
                    source_run_id=self.run_id,
                    tags={RUN_KEY: run.data.tags[RUN_KEY], ADAPTER_SHA256: sha256},
                    params=flat,
                    model_type=MODEL_TYPE,
                )
            model_id = str(model.model_id)
            if str(model.status) != "READY":
                names = [path.relative_to(folder).as_posix() for path in folder.rglob("*")]
                digests = json.dumps(digests_of(folder, names))
                self.client.set_logged_model_tags(model_id, {FILES_SHA256: digests})
                self.client.log_model_artifacts(model_id, str(folder))
                self.client.finalize_logged_model(model_id, "READY")
            outputs = run.outputs.model_outputs if run.outputs else []
            if model_id not in [output.model_id for output in outputs]:
                self.client.log_outputs(self.run_id, [LoggedModelOutput(model_id, step=0)])
        return model_id

    def is_finished(self) -> bool:
        """Whether the run has ended as it should."""
        with self._saying("read the state"):
            return bool(self.client.get_run(self.run_id).info.status == "FINISHED")

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
        for point in self._curve:
            if point.step > self._last_step(point.key):
                self._waiting.append(point)
                self._last_steps[point.key] = point.step
        self._curve = []
        if self._waiting:
            self.client.log_batch(self.run_id, metrics=self._waiting)
            self._waiting = []

    def _last_step(self, key: str) -> int:
        if key not in self._last_steps:
            history = self.client.get_metric_history(self.run_id, key)
            self._last_steps[key] = max((point.step for point in history), default=-1)
        return self._last_steps[key]

    def _logged_model(self, experiment_id: str, sha256: str) -> LoggedModel | None:
        own = f"source_run_id = '{self.run_id}' AND tags.`{ADAPTER_SHA256}` = '{sha256}'"
        found = self.client.search_logged_models([experiment_id], own, max_results=1)
        return found[0] if found else None

    def _saying(self, doing: str) -> AbstractContextManager[None]:
        return saying(f"{doing} of run {self.run_id}", self.client.tracking_uri)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, str(value)
