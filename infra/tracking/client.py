"""Access to MLflow: clients with an explicit address, and errors that say what to do."""

from __future__ import annotations

import importlib.metadata
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import quote

import httpx
import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from sqlalchemy.exc import SQLAlchemyError

from deal_core.errors import RegistryError
from deal_core.safe_text import without_secrets
from infra.settings import TrackingSettings

MLFLOW = "mlflow-skinny"
"""The distribution that has MLflow's client. `mlflow` adds the server, in the same version; a worker does without."""
KIND = "deal.kind"
"""Tag of a run that is not an adaptation, such as "monitor"."""
ANSWER_SECONDS = 10.0

_address_lock = threading.Lock()


def installed_version(name: str) -> str:
    """Return the version of a distribution (of `mlflow`, that of its client), or raise PackageNotFoundError."""
    return importlib.metadata.version(MLFLOW if name == "mlflow" else name)


def open_client(settings: TrackingSettings) -> MlflowClient:
    """Return a client of the tracking server or database. The folder of an SQLite file is created.

    Raises:
        RegistryError: The address does not answer, or the database cannot be read.
    """
    uri = settings.tracking_uri
    file = Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None
    if file is not None and file.is_file():  # MLflow's client would try to open a damaged one for minutes
        place = f"file:{quote(os.path.abspath(file))}?mode=ro"
        try:
            with closing(sqlite3.connect(place, uri=True, timeout=30)) as database:
                database.execute("SELECT name FROM sqlite_master").fetchone()
        except sqlite3.Error as error:
            raise RegistryError(
                f"Cannot read MLflow's database {file}: {error}. If the file is damaged, restore it from a backup; "
                "without one, move it away and give: deal server sync"
            ) from error
    with report_errors("open MLflow", uri):
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
        return MlflowClient(tracking_uri=uri, registry_uri=uri)


def require_answer(uri: str) -> None:
    """Raise RegistryError if a tracking server does not answer within ANSWER_SECONDS. A database is not asked.

    One request tells; MLflow's client would repeat its own for minutes.
    """
    if not uri.startswith(("http://", "https://")):
        return
    where = without_secrets(uri)
    try:
        answer = httpx.get(f"{uri.rstrip('/')}/version", timeout=ANSWER_SECONDS, follow_redirects=True)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise RegistryError(f"MLflow at {where} does not answer ({type(error).__name__}).") from None
    if answer.status_code >= 500:
        raise RegistryError(f"MLflow at {where} does not answer (status {answer.status_code}).")


@contextmanager
def report_errors(action: str, uri: str) -> Iterator[None]:
    """Replace MLflow's errors by a RegistryError with the action and the place that failed.

    The cause is left out if it or the address contains a password, because logs show tracebacks.
    """
    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError, ImportError) as error:
        reason = without_secrets(str(error).strip().split("\n")[0].rstrip("."))
        where = without_secrets(uri)
        quoted = f"{uri} {error}"
        cause = error if without_secrets(quoted) == quoted else None
        raise RegistryError(f"Cannot {action} at {where}: {reason}; check MLFLOW_TRACKING_URI.") from cause


@contextmanager
def global_address(uri: str) -> Iterator[None]:
    """Make `uri` MLflow's global address during the block. A database store reads logged models through it."""
    with _address_lock:
        if mlflow.get_tracking_uri() == uri:  # set by MLFLOW_TRACKING_URI; a setting would outlive the variable
            yield
            return
        before = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None  # type: ignore[no-untyped-call]
        mlflow.set_tracking_uri(uri)
        try:
            yield
        finally:
            mlflow.set_tracking_uri(before)  # type: ignore[arg-type]


def remove_artifacts(client: MlflowClient, location: str, names: Iterable[str]) -> None:
    """Remove files and folders at the top of a place of artifacts."""
    repository = get_artifact_repository(location, tracking_uri=client.tracking_uri)
    for name in names:
        repository.delete_artifacts(name)  # type: ignore[no-untyped-call] # MLflow has no types for it
