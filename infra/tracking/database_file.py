"""The file of MLflow's SQLite database: where it is, which tables it has, and a connection that only reads."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

from deal_core.errors import RegistryError

WAIT_SECONDS = 30.0
"""Longest wait for a writer of the database."""


def database_file(uri: str) -> Path | None:
    """Return the file of an SQLite database; None: the address names no such file, or MLflow uses workspaces.

    Example:
        >>> database_file("sqlite:////srv/deal/mlflow.db")
        PosixPath('/srv/deal/mlflow.db')
    """
    path = uri.removeprefix("sqlite:///")
    is_plain = path not in ("", uri) and not path.startswith(":") and not {"?", "%", "#"} & set(path)
    uses_workspaces = any(name.startswith("MLFLOW_") and "WORKSPACE" in name for name in os.environ)
    return Path(path) if is_plain and not uses_workspaces else None


def schema_of(file: Path) -> str | None:
    """Return the revision of a database's tables; None: there is no database, or it has no revision.

    Raises:
        RegistryError: The file cannot be read. MLflow's client would try for minutes.
    """
    if not file.is_file():
        return None
    try:
        with closing(connect(file)) as database:
            found = database.execute("SELECT version_num FROM alembic_version").fetchall()
    except sqlite3.Error as error:
        if "no such table" in str(error):
            return None  # MLflow's client makes the tables
        raise RegistryError(
            f"Cannot read MLflow's database {file}: {error}. If the file is damaged, restore it from a backup; without "
            "one, move it away and give: deal server sync"
        ) from error
    return str(found[0][0]) if len(found) == 1 else None


def connect(file: Path) -> sqlite3.Connection:
    """Open a database. Reading creates no file."""
    address = f"file:{quote(os.path.abspath(file))}?mode=ro"
    return sqlite3.connect(address, uri=True, timeout=WAIT_SECONDS, isolation_level=None)
