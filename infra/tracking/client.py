"""How MLflow is reached: clients with an explicit address, and errors that a user can act on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tenacity
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from deal_core.errors import RegistryError
from deal_core.masking import without_secrets
from infra.settings import TrackingSettings

RUN_KEY = "deal.run_key"
"""Tag that says which adaptation a run, a model and a version belong to."""
FILES_SHA256 = "deal.files_sha256"
"""Tag of a logged model: SHA-256 of each of its files, as JSON."""


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
    """Turn MLflow's errors into one that says what failed, and where.

    Its cause stays hidden where it or the address has a password: tracebacks go to logs.
    """
    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError, ImportError) as error:
        reason = without_secrets(str(error).strip().split("\n")[0].rstrip("."))
        where = without_secrets(uri)
        quoted = f"{uri} {error}"
        cause = error if without_secrets(quoted) == quoted else None
        raise RegistryError(f"Cannot {doing} at {where}: {reason}; check MLFLOW_TRACKING_URI.") from cause


again_if_overtaken = tenacity.retry(
    retry=tenacity.retry_if_exception_message(match="(?i).*(unique|duplicate)"),
    wait=tenacity.wait_random(max=0.2),
    stop=tenacity.stop_after_attempt(3),
    reraise=True,
)
"""Decorates what sets a value, and can be repeated.

MLflow looks whether the value's row is there, then inserts or updates it: of two that set it first at once, one is told
that the row is there by now. Its second try updates it.
"""
