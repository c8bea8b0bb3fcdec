"""The registered model of a lineage in MLflow: its versions, its tags and its aliases.

MLflow numbers versions by itself. The tag `deal.version` alone says which version of the lineage an entry is; if MLflow
repeated a call whose answer was lost, two entries have the same run key, and the older one counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.utils import get_results_from_paginated_fn

from deal_core.errors import RegistryError
from deal_core.safe_text import without_secrets
from infra.tracking.client import KIND, global_address, remove_artifacts, report_errors

OWNER = {KIND: "lineage"}
"""Tag of the registered models that are lineages."""
RUN_KEY = "deal.run_key"
"""Tag of a run, a logged model and a version: the key of their adaptation."""
VERSION = "deal.version"
"""Tag of a version: its number in the lineage."""
REMOVED = "deal.adapter_removed"
"""Tag of a version and its logged model: the day on which the adapter was removed."""
DESCRIPTION = "Versions of one adapter, task by task."
PAGE = 1000
"""Number of versions that are requested at once."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A version in MLflow."""

    mlflow_number: str
    model_id: str


@dataclass(frozen=True, kw_only=True)
class RegisteredLineage:
    """What MLflow knows of a lineage."""

    tags: Mapping[str, str]
    aliases: Mapping[str, str]
    """MLflow's number by alias."""
    entries: Mapping[str, Entry]
    """By number in the lineage."""

    def number_of(self, alias: str) -> str | None:
        """Return the number in the lineage of the version with an alias; None: there is none, or it is no version."""
        held = self.aliases.get(alias)
        return next((number for number, entry in self.entries.items() if entry.mlflow_number == held), None)


class ModelRegistry:
    """Reads and writes the registered models of lineages."""

    def __init__(self, client: MlflowClient, uri: str) -> None:
        self._client = client
        self._uri = uri

    def read(self, lineage: str) -> RegisteredLineage:
        """Return what MLflow knows of a lineage; make its registered model if it is new.

        Raises:
            RegistryError: MLflow does not answer, or the name belongs to a registered model of another program.
        """
        with report_errors(f"read {lineage!r}", self._uri):
            try:
                model = self._client.get_registered_model(lineage)
            except MlflowException as absent:
                # MLflow's basic auth does not tell a user without rights whether there is such a model
                if absent.error_code not in ("RESOURCE_DOES_NOT_EXIST", "PERMISSION_DENIED"):
                    raise
                model = self._client.create_registered_model(lineage, tags=OWNER, description=DESCRIPTION)
            if not OWNER.items() <= model.tags.items():
                raise RegistryError(
                    f"MLflow at {without_secrets(self._uri)} has a registered model {lineage!r} that is no lineage of "
                    "this pipeline: the lineage is not shown there. Rename that model."
                )
            versions = get_results_from_paginated_fn(  # type: ignore[no-untyped-call] # MLflow has no types for it
                lambda size, token: self._client.search_model_versions(f"name = '{lineage}'", size, page_token=token),
                PAGE,
            )
        entries = {
            version.tags[VERSION]: Entry(
                mlflow_number=str(version.version), model_id=(version.source or "").removeprefix("models:/")
            )
            for version in sorted(versions, key=lambda version: int(version.version), reverse=True)  # the oldest counts
            if VERSION in version.tags
        }
        return RegisteredLineage(
            tags=model.tags, aliases={name: str(number) for name, number in model.aliases.items()}, entries=entries
        )

    def add(
        self, lineage: str, version: str, *, run_id: str, model_id: str, tags: Mapping[str, str], description: str
    ) -> Entry:
        """Make an entry for a version of the lineage."""
        with report_errors(f"register version {version} of {lineage!r}", self._uri), global_address(self._uri):
            made = self._client.create_model_version(
                lineage,
                source=f"models:/{model_id}",
                run_id=run_id,
                tags={**tags, VERSION: version},
                description=description[:5000],
                model_id=model_id,
            )
            shown = [{"name": lineage, "version": made.version}]  # MLflow's page of the model shows its versions by it
            self._client.set_logged_model_tags(model_id, {"mlflow.modelVersions": json.dumps(shown)})
        return Entry(mlflow_number=str(made.version), model_id=model_id)

    def set_alias(self, lineage: str, alias: str, entry: Entry | None) -> None:
        """Move an alias to an entry; None: remove it."""
        with report_errors(f"set {lineage}@{alias}", self._uri):
            if entry is None:
                self._client.delete_registered_model_alias(lineage, alias)
            else:
                self._client.set_registered_model_alias(lineage, alias, entry.mlflow_number)

    def tag(self, lineage: str, tags: Mapping[str, str]) -> None:
        """Set tags of the registered model."""
        with report_errors(f"tag {lineage!r}", self._uri):
            for name, value in tags.items():
                self._client.set_registered_model_tag(lineage, name, value)

    def remove_files(self, lineage: str, entry: Entry, day: str) -> None:
        """Remove the files of a version's logged model, and tag both with the day. Can be repeated."""
        with report_errors(f"remove the files of a version of {lineage!r}", self._uri):
            self._client.set_model_version_tag(lineage, entry.mlflow_number, REMOVED, day)
            if entry.model_id:
                self._client.set_logged_model_tags(entry.model_id, {REMOVED: day})
                location = str(self._client.get_logged_model(entry.model_id).artifact_location)
                files = self._client.list_logged_model_artifacts(entry.model_id)
                remove_artifacts(self._client, location, [file.path for file in files])
