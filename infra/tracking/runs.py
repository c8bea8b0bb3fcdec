"""The list of a lineage's MLflow runs, and the removal of artifacts of runs and versions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import FileInfo, Run, ViewType
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from infra.store import keys
from infra.tracking.client import KIND, all_pages, found_or_none, report_errors
from infra.tracking.facts import RUN_KEY
from infra.tracking.tracker import Tracker

RUN_ARTIFACTS = ("report.json", "report.html")
"""Files and folders of a run that contain rows: gained and lost examples, and rows in quarantine. Code that logs rows
under another name adds the name here."""
REMOVED = "deal.adapter_removed"
"""Tag of a version and its logged model: the day on which the adapter was removed."""


def artifacts_with_rows(paths: Iterable[str]) -> tuple[str, ...]:
    """Return those of a run's artifacts that must be removed when the run's rows are forgotten.

    Example:
        >>> artifacts_with_rows(["evaluation.json", "report.html", "figures/loss.png"])
        ('report.html',)
    """
    return tuple(path for path in paths if path.split("/")[0] in RUN_ARTIFACTS)


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """A run of a lineage."""

    run_id: str
    run_key: str
    status: str
    """MLflow's status: RUNNING, FINISHED, FAILED, …"""
    dataset_sha256: str
    parent_version: str | None
    """None: the run starts from the base model."""
    touched: datetime
    """End of the run; its start if it has not ended."""

    @property
    def short_key(self) -> str:
        """The part of the key that is used in folder names."""
        return keys.short_run(self.run_key)


def list_runs(tracker: Tracker, lineage: str) -> tuple[RunInfo, ...]:
    """Return the adaptation runs of a lineage, oldest first; empty if the lineage has no experiment."""
    client = tracker.client
    with report_errors(f"list the runs of {lineage!r}", tracker.uri):
        experiment = client.get_experiment_by_name(f"deal/{lineage}")
        if experiment is None:
            return ()
        runs = all_pages(client.search_runs, [experiment.experiment_id], run_view_type=ViewType.ALL)
        infos = [_read(run) for run in runs if RUN_KEY in run.data.tags and KIND not in run.data.tags]
    return tuple(sorted(infos, key=lambda info: info.touched))


def _read(run: Run) -> RunInfo:
    parent = run.data.tags.get("deal.parent_version", "base")
    return RunInfo(
        run_id=run.info.run_id,
        run_key=run.data.tags[RUN_KEY],
        status=run.info.status,
        dataset_sha256=run.data.tags.get("deal.dataset_sha256", ""),
        parent_version=None if parent == "base" else parent,
        touched=datetime.fromtimestamp((run.info.end_time or run.info.start_time) / 1000, UTC),
    )


class ArtifactRemover:
    """Removes artifacts. Runs, models and versions stay; models and versions get a tag."""

    def __init__(self, tracker: Tracker) -> None:
        self._client: MlflowClient = tracker.client
        self._uri = tracker.uri

    def model_bytes(self, model_id: str) -> int:
        """Return the size of a logged model's files; 0 if it has none or is unknown."""
        return sum(file.file_size or 0 for file in self._model_files(model_id))

    def remove_model(self, lineage: str, version: str, model_id: str, day: str) -> None:
        """Tag a version with the day of the removal, then remove the files of its logged model. Can be repeated."""
        with report_errors(f"remove the adapter of version {version} of {lineage!r}", self._uri):
            self._client.set_model_version_tag(lineage, version, REMOVED, day)
            if not self._model_files(model_id):
                return
            self._client.set_logged_model_tags(model_id, {REMOVED: day})
            location = str(self._client.get_logged_model(model_id).artifact_location)
            self._delete(location, [entry.path for entry in self._client.list_logged_model_artifacts(model_id)])

    def replace_in_model(self, model_id: str, folder: Path) -> None:
        """Replace the files of a logged model by files of the folder with the same name; ignore other files."""
        kept = {file.path for file in self._model_files(model_id)}
        with report_errors(f"replace files of the model {model_id}", self._uri):
            for path in sorted(folder.iterdir()):
                if path.name in kept:
                    self._client.log_model_artifact(model_id, str(path))

    def run_files(self, run_id: str) -> list[str]:
        """Return the paths of all artifacts of a run."""
        with report_errors(f"list the artifacts of run {run_id}", self._uri):
            return [file.path for file in _walk(lambda path: self._client.list_artifacts(run_id, path))]

    def remove_run_files(self, run_id: str, paths: Sequence[str]) -> None:
        """Remove artifacts of a run. Can be repeated."""
        with report_errors(f"remove artifacts of run {run_id}", self._uri):
            self._delete(str(self._client.get_run(run_id).info.artifact_uri), paths)

    def _model_files(self, model_id: str) -> list[FileInfo]:
        with report_errors(f"list the artifacts of the model {model_id}", self._uri):
            files = _walk(lambda path: self._client.list_logged_model_artifacts(model_id, path))
            return found_or_none(list, files) or []

    def _delete(self, location: str, paths: Sequence[str]) -> None:
        if paths:
            repository = get_artifact_repository(location, tracking_uri=self._uri)
            for path in paths:
                repository.delete_artifacts(path)  # type: ignore[no-untyped-call]


def _walk(list_folder: Callable[[str | None], list[FileInfo]], path: str | None = None) -> Iterator[FileInfo]:
    for entry in list_folder(path):
        if entry.is_dir:
            yield from _walk(list_folder, entry.path)
        else:
            yield entry
