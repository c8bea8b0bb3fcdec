"""The folder in which one `deal serve` keeps the versions it has fetched; others can tell whether it still runs."""

from __future__ import annotations

import secrets
import shutil
from pathlib import Path

from filelock import FileLock

SERVE = "serve"


def lock_of(folder: Path) -> Path:
    """The file that whoever serves from the folder holds locked."""
    return folder / "lock"


class ServedCopies:
    """A new folder below HOME/serve, held until it is closed; `deal gc` removes one that nobody holds any more."""

    def __init__(self, home: Path, lineage: str) -> None:
        self._folder = home / SERVE / f"{lineage}-{secrets.token_hex(8)}"
        self._lock = FileLock(lock_of(self._folder), thread_local=False)

    def open(self) -> None:
        """Make the folder."""
        self._folder.mkdir(parents=True)
        self._lock.acquire()

    def folder_of(self, version: str) -> Path:
        """Where a version lies, or will lie."""
        return self._folder / f"v{version}"

    def remove(self, version: str) -> None:
        """Remove a version, if it is there."""
        shutil.rmtree(self.folder_of(version), ignore_errors=True)

    def close(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._lock.release()
