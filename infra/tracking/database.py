"""Reads the model registry from the file of MLflow's SQLite database, without MLflow.

Importing MLflow and opening its store take seconds of processor time, most of what `deal history` takes. The file is
read only if this module knows its tables. Every other registry, such as a server, is read with MLflow's client.
"""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from deal_core.errors import RegistryError
from deal_core.safe_text import without_secrets
from infra.settings import TrackingSettings
from infra.tracking.database_file import connect, database_file, schema_of
from infra.tracking.facts import RUN_KEY, ModelRow, RegistryReader, VersionRow

KNOWN_SCHEMAS = frozenset({"dc11669786a5"})
"""Revisions of MLflow's tables that this module can read. Where the installed MLflow has one of them, a test compares
this reader with MLflow's client."""
WORKSPACE = "default"
"""MLflow's workspace where workspaces are not used."""
DELETED = "Deleted_Internal"
"""MLflow's stage of a version that was deleted."""


def open_reader(settings: TrackingSettings | None = None) -> RegistryReader:
    """Return a reader of the registry of `settings`, or of the environment; errors are those of `open_client`."""
    settings = settings or TrackingSettings()
    file = database_file(settings.tracking_uri)
    if file is not None and schema_of(file) in KNOWN_SCHEMAS:
        return DatabaseReader(settings.tracking_uri, file)
    from infra.tracking.mlflow_reader import MlflowReader  # imports MLflow

    return MlflowReader(settings)


class DatabaseReader(RegistryReader):
    """Reads versions and aliases of lineages from a database file. It finds what MLflow's client finds."""

    def __init__(self, uri: str, file: Path) -> None:
        self.uri = uri
        self._file = file

    def find_model(self, lineage: str) -> ModelRow | None:
        """Return the registered model with this name, if there is one."""
        found = self._read_models(f"read {lineage!r}", "AND name = :name", name=lineage)
        return found[0] if found else None

    def _models(self) -> list[ModelRow]:
        return self._read_models("search lineages")

    def _versions(self, lineage: str, at_most: int | None) -> list[VersionRow]:
        own = "AND version IN (SELECT version FROM model_version_tags WHERE name = :name AND key = :key)"
        limit = -1 if at_most is None else at_most
        return self._read_versions("search versions", own, name=lineage, key=RUN_KEY, limit=limit)

    def _version(self, lineage: str, number: str) -> VersionRow | None:
        if not number.isdecimal():
            return None
        found = self._read_versions(
            f"read version {number} of {lineage!r}", "AND version = :number", name=lineage, number=number, limit=1
        )
        return found[0] if found else None

    def _with_run_key(self, run_key: str) -> list[VersionRow]:
        with self._reading("search versions", {"key": RUN_KEY, "value": run_key}) as select:
            found = select(
                "SELECT name, version FROM model_version_tags WHERE workspace = :workspace AND key = :key "
                "AND value = :value"
            )
        return list(filter(None, (self._version(name, str(number)) for name, number in found)))

    def _read_models(self, action: str, condition: str = "", **values: Any) -> list[ModelRow]:
        where = f"WHERE workspace = :workspace {condition}"
        with self._reading(action, values) as select:
            names = select(f"SELECT name FROM registered_models {where} ORDER BY name")
            tags = _by_owner(select(f"SELECT name, key, value FROM registered_model_tags {where}"))
            aliases = _by_owner(select(f"SELECT name, alias, version FROM registered_model_aliases {where}"))
        return [ModelRow(name, tags[name], aliases[name]) for (name,) in names]

    def _read_versions(self, action: str, condition: str, **values: Any) -> list[VersionRow]:
        """Return versions that were not deleted, newest first, at most `limit` of them."""
        with self._reading(action, values) as select:
            rows = select(
                "SELECT version, run_id, source, creation_time FROM model_versions WHERE workspace = :workspace "
                f"AND name = :name AND current_stage != '{DELETED}' {condition} ORDER BY version DESC LIMIT :limit"
            )
            if not rows:
                return []
            values |= {"newest": rows[0][0], "oldest": rows[-1][0]}
            tags = _by_owner(
                select(
                    "SELECT version, key, value FROM model_version_tags WHERE workspace = :workspace AND name = :name "
                    "AND version BETWEEN :oldest AND :newest"
                )
            )
        return [
            VersionRow(values["name"], str(number), run_id, source, created, tags[number])
            for number, run_id, source, created in rows
        ]

    @contextmanager
    def _reading(self, action: str, values: dict[str, Any]) -> Iterator[Callable[[str], list[tuple[Any, ...]]]]:
        """Give a function that runs a query with these values. All queries see the same state of the database."""
        try:
            with closing(connect(self._file)) as database:
                database.execute("BEGIN")
                yield lambda query: database.execute(query, {"workspace": WORKSPACE, **values}).fetchall()
        except sqlite3.Error as error:
            where = without_secrets(self.uri)
            raise RegistryError(f"Cannot {action} at {where}: {error}; check MLFLOW_TRACKING_URI.") from error


def _by_owner(rows: Iterable[tuple[Any, ...]]) -> Mapping[Any, dict[str, str]]:
    """Return the values by their owner and their name. An owner without a value has an empty mapping."""
    found: dict[Any, dict[str, str]] = defaultdict(dict)
    for owner, name, value in rows:
        found[owner][name] = str(value)
    return found
