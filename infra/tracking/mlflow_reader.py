"""Reads the model registry with MLflow's client: from a server, or from a database that only MLflow can read."""

from __future__ import annotations

from collections.abc import Iterator

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion, RegisteredModel

from infra.settings import TrackingSettings
from infra.tracking.client import PAGE, all_pages, found_or_none, open_client, report_errors
from infra.tracking.facts import RUN_KEY, ModelRow, RegistryReader, VersionRow


class MlflowReader(RegistryReader):
    """Reads versions and aliases of lineages with MLflow's client.

    Raises:
        RegistryError: The address does not answer.
    """

    def __init__(self, settings: TrackingSettings) -> None:
        self.uri = settings.tracking_uri
        self._client: MlflowClient = open_client(settings)

    def find_model(self, lineage: str) -> ModelRow | None:
        """Return the registered model with this name, if there is one."""
        with report_errors(f"read {lineage!r}", self.uri):
            found = found_or_none(self._client.get_registered_model, lineage)
        return None if found is None else _model_row(found)

    def _models(self) -> Iterator[ModelRow]:
        with report_errors("search lineages", self.uri):
            yield from map(_model_row, all_pages(self._client.search_registered_models, order_by=["name"]))

    def _versions(self, lineage: str, at_most: int | None) -> Iterator[VersionRow]:
        return self._search(f"name = '{lineage}'", at_most)

    def _version(self, lineage: str, number: str) -> VersionRow | None:
        with report_errors(f"read version {number} of {lineage!r}", self.uri):
            found = found_or_none(self._client.get_model_version, lineage, number)
        return None if found is None else _version_row(found)

    def _with_run_key(self, run_key: str) -> Iterator[VersionRow]:
        return self._search(f"tags.`{RUN_KEY}` = '{run_key}'", None)

    def _search(self, condition: str, at_most: int | None) -> Iterator[VersionRow]:
        with report_errors("search versions", self.uri):
            found = all_pages(
                self._client.search_model_versions,
                condition,
                max_results=min(at_most or PAGE, PAGE),
                order_by=["version_number DESC"],
            )
            yield from map(_version_row, found)


def _model_row(model: RegisteredModel) -> ModelRow:
    return ModelRow(model.name, model.tags, {alias: str(number) for alias, number in model.aliases.items()})


def _version_row(version: ModelVersion) -> VersionRow:
    return VersionRow(
        name=version.name,
        number=str(version.version),
        run_id=version.run_id,
        source=version.source,
        created_ms=version.creation_timestamp,
        tags=version.tags,
    )
