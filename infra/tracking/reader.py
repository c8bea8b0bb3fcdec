"""What is read of the model registry, wherever it is read from: from MLflow, or from the file of its database."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import fields
from datetime import UTC, datetime
from itertools import islice
from typing import Any, NamedTuple

from deal_core.errors import RegistryError
from deal_core.judging_config import RolloutTerms
from deal_core.safe_text import without_secrets
from infra.tracking.facts import RUN_KEY, Alias, VersionFacts, VersionInfo

OWNER = {"deal.kind": "lineage"}
"""Tag of the registered models that are lineages."""
REBUILDING = "deal.rebuilding"
"""Tag of a registered model during its rebuild."""


class ModelRow(NamedTuple):
    """A registered model."""

    name: str
    tags: Mapping[str, str]
    aliases: Mapping[str, str]
    """Number of the version of each alias."""


class VersionRow(NamedTuple):
    """A version of a registered model, as MLflow keeps it."""

    name: str
    number: str
    run_id: str | None
    source: str | None
    created_ms: int
    """Milliseconds since 1970."""
    tags: Mapping[str, str]


class RegistryReader(ABC):
    """Reads versions and aliases of lineages."""

    uri: str
    """Address of the registry."""

    @abstractmethod
    def find_model(self, lineage: str) -> ModelRow | None:
        """Return the registered model with this name, if there is one."""

    @abstractmethod
    def _models(self) -> Iterable[ModelRow]:
        """Return all registered models, in the order of their names."""

    @abstractmethod
    def _versions(self, lineage: str, at_most: int | None) -> Iterable[VersionRow]:
        """Return the versions of a registered model, newest first. A page may have `at_most` of them."""

    @abstractmethod
    def _version(self, lineage: str, number: str) -> VersionRow | None:
        """Return one version of a registered model, if there is one."""

    def versions(self, lineage: str, *, newest: int | None = None) -> tuple[VersionInfo, ...]:
        """Return all or the `newest` versions of a lineage, oldest first; empty if the lineage is unknown."""
        own = (row for row in self._versions(lineage, newest) if RUN_KEY in row.tags)
        found = sorted(islice(own, newest), key=lambda row: int(row.number))
        aliases = self._aliases(lineage) if found else {}
        return tuple(as_version(row, aliases) for row in found)

    def champion(self, lineage: str) -> VersionInfo | None:
        """Return the lineage's champion, if it has one."""
        return self.with_alias(lineage, "champion")

    def lineages_with(self, alias: Alias) -> tuple[str, ...]:
        """Return the names of the lineages with an alias, in alphabetical order."""
        own = (model for model in self._models() if OWNER.items() <= model.tags.items())
        return tuple(model.name for model in own if alias in model.aliases)

    def with_alias(self, lineage: str, alias: Alias) -> VersionInfo | None:
        """Return the version with an alias, if there is one."""
        aliases = self._aliases(lineage)
        if alias not in aliases:
            return None
        found = self._version(lineage, aliases[alias])
        if found is None:
            raise RegistryError(
                f"Version {aliases[alias]}, {alias} of '{lineage}', was deleted at {without_secrets(self.uri)}."
            )
        return as_version(found, aliases)

    def version(self, lineage: str, number: str) -> VersionInfo | None:
        """Return the version with a number, if there is one."""
        found = self._version(lineage, number)
        return None if found is None else as_version(found, self._aliases(lineage))

    def _aliases(self, lineage: str) -> Mapping[str, str]:
        """Return the version number of each alias."""
        model = self.find_model(lineage)
        return model.aliases if model else {}


def is_being_rebuilt(registry: RegistryReader, lineage: str) -> bool:
    """Return whether a rebuild of the lineage was begun and has not ended."""
    model = registry.find_model(lineage)
    return model is not None and REBUILDING in model.tags


def as_version(version: VersionRow, aliases: Mapping[str, str]) -> VersionInfo:
    """Return the facts of a version. `aliases` are those of its registered model."""
    tags = {key.removeprefix("deal."): value for key, value in version.tags.items()}
    created = datetime.fromtimestamp(version.created_ms / 1000, UTC)
    if "created" in tags:  # a rebuilt registry has the time of the first registration as a tag
        created = datetime.fromisoformat(tags["created"])
    values: dict[str, Any] = {
        "accepted": tags.get("gate") == "accepted",
        "reasons": tuple(json.loads(tags.get("gate_reasons", "[]"))),
        "vetoes": tuple(json.loads(tags.get("gate_vetoes", "[]"))),
        "files_sha256": None,
        "rollout": RolloutTerms(**json.loads(tags["rollout"])) if "rollout" in tags else None,
    }
    if "files_sha256" in tags:
        values["files_sha256"] = {name: tuple(each) for name, each in json.loads(tags["files_sha256"]).items()}
    for name in ("parent_version", "approval", "flow_run", "landed_sha256", "requeued_sha256"):
        values[name] = tags.get(name)
    for name in ("average_accuracy", "forgetting", "backward_transfer", "forward_transfer"):
        values[name] = float(tags[name]) if name in tags else None
    values |= {field.name: tags.get(field.name, "") for field in fields(VersionFacts) if field.name not in values}
    return VersionInfo(
        **values,
        lineage=version.name,
        version=version.number,
        aliases=tuple(sorted(alias for alias, holder in aliases.items() if holder == version.number)),
        created=created,
        tracking_id=version.run_id or "",
        model_id=(version.source or "").removeprefix("models:/"),
        promoted=tags.get("promoted"),
        rolled_out=tags.get("rolled_out"),
        refused_by=tags.get("refused_by"),
        adapter_removed=tags.get("adapter_removed"),
    )
