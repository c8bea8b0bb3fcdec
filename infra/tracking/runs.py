"""The MLflow runs of a lineage, and the removal of what they and their versions keep as artifacts.

Example:
    >>> [run.status for run in list_runs(open_tracker(), "base")]  # doctest: +SKIP
    ['FINISHED', 'FAILED']
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import FileInfo, ViewType
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from infra.tracking.client import RUN_KEY, saying
from infra.tracking.tracker import Tracker

RUN_ARTIFACTS = ("report.json", "report.html")
"""At the top of a run: examples gained and lost, and rows in quarantine. Whoever logs rows elsewhere adds the name, or
that of the folder."""
PAGE = 1000
REMOVED = "deal.adapter_removed"
"""Tag of a version, and of its logged model, whose adapter is gone: the day."""


def artifacts_with_rows(paths: Iterable[str]) -> tuple[str, ...]:
    """Those of a run's artifacts that must go when rows that it saw are forgotten.

    Example:
        >>> artifacts_with_rows(["evaluation.json", "report.html", "figures/loss.png"])
        ('report.html',)
    """
    return tuple(path for path in paths if path.split("/")[0] in RUN_ARTIFACTS)


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """A run as a lineage's experiment has it."""

    run_id: str
    run_key: str
    status: str
    """MLflow's word: RUNNING, FINISHED, FAILED, …"""
    dataset_sha256: str
    parent_version: str | None
    """None: it starts from the base model."""
    touched: datetime
    """When it ended, else when it began."""

    @property
    def short_key(self) -> str:
        """The part of the key that names folders."""
        return self.run_key[:16]


def list_runs(tracker: Tracker, lineage: str) -> tuple[RunInfo, ...]:
    """The runs of a lineage, oldest first; none where it has no experiment."""
    client, found, token = tracker.client, [], None
    with saying(f"list the runs of {lineage!r}", tracker.uri):
        experiment = client.get_experiment_by_name(f"deal/{lineage}")
        if experiment is None:
            return ()
        while True:
            page = client.search_runs(
                [experiment.experiment_id], run_view_type=ViewType.ALL, max_results=PAGE, page_token=token
            )
            found += [run for run in page if RUN_KEY in run.data.tags]
            token = page.token
            if not token:
                break
    infos = []
    for run in found:
        parent = run.data.tags.get("deal.parent_version", "base")
        infos.append(
            RunInfo(
                run_id=run.info.run_id,
                run_key=run.data.tags[RUN_KEY],
                status=run.info.status,
                dataset_sha256=run.data.tags.get("deal.dataset_sha256", ""),
                parent_version=None if parent == "base" else parent,
                touched=datetime.fromtimestamp((run.info.end_time or run.info.start_time) / 1000, UTC),
            )
        )
    return tuple(sorted(infos, key=lambda info: info.touched))


class ArtifactRemover:
    """Removes artifacts; runs, models and versions stay and say that something was removed."""

    def __init__(self, tracker: Tracker) -> None:
        self._client: MlflowClient = tracker.client
        self._uri = tracker.uri

    def model_bytes(self, model_id: str) -> int:
        """Size of what a logged model keeps; 0 where it keeps nothing or is unknown."""
        return sum(file.file_size or 0 for file in self._model_files(model_id))

    def remove_model(self, lineage: str, version: str, model_id: str, day: str) -> None:
        """Say that a version's adapter is removed, then remove what MLflow keeps of it. Can be repeated."""
        with saying(f"remove the adapter of version {version} of {lineage!r}", self._uri):
            self._client.set_model_version_tag(lineage, version, REMOVED, day)
            if not any(True for _ in self._model_files(model_id)):
                return
            self._client.set_logged_model_tags(model_id, {REMOVED: day})
            location = str(self._client.get_logged_model(model_id).artifact_location)
            self._delete(location, [entry.path for entry in self._client.list_logged_model_artifacts(model_id)])

    def replace_in_model(self, model_id: str, folder: Path) -> None:
        """Put the folder's files over those of the same name that a logged model keeps; others are left out."""
        kept = {file.path for file in self._model_files(model_id)}
        with saying(f"replace files of the model {model_id}", self._uri):
            for path in sorted(folder.iterdir()):
                if path.name in kept:
                    self._client.log_model_artifact(model_id, str(path))

    def run_files(self, run_id: str) -> list[str]:
        """Paths of all artifacts of a run."""
        with saying(f"list the artifacts of run {run_id}", self._uri):
            return [file.path for file in _walk(lambda path: self._client.list_artifacts(run_id, path))]

    def remove_run_files(self, run_id: str, paths: Sequence[str]) -> None:
        """Remove artifacts of a run. Can be repeated."""
        with saying(f"remove artifacts of run {run_id}", self._uri):
            self._delete(str(self._client.get_run(run_id).info.artifact_uri), paths)

    def _model_files(self, model_id: str) -> list[FileInfo]:
        with saying(f"list the artifacts of the model {model_id}", self._uri):
            try:
                return list(_walk(lambda path: self._client.list_logged_model_artifacts(model_id, path)))
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                return []

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
