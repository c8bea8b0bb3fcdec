"""The folder in which one `deal serve` keeps the versions it has fetched; others can tell whether it still runs."""

from __future__ import annotations

import re
import secrets
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

SERVE = "serve"


def lock_of(folder: Path) -> Path:
    """The file that whoever serves from the folder holds locked."""
    return folder / "lock"


class ServedCopies:
    """A new folder below HOME/serve, held until it is closed; `deal gc` removes one that nobody holds any more."""

    def __init__(self, home: Path, lineage: str) -> None:
        self._lineage = lineage
        self._logs = home / "logs"
        self._folder = home / SERVE / f"{lineage}-{secrets.token_hex(8)}"
        self._lock = FileLock(lock_of(self._folder), thread_local=False)

    def open(self) -> None:
        """Make the folder."""
        self._folder.mkdir(parents=True)
        self._lock.acquire()

    def folder_of(self, version: str) -> Path:
        """Where a version lies, or will lie."""
        return self._folder / f"v{version}"

    def log_of(self, version: str) -> Path:
        """Where the servers of a version write; others that serve the lineage in this home write there too."""
        return self._logs / f"serve-{self._lineage}-v{version}.log"

    def remove(self, version: str) -> None:
        """Remove a version, if it is there."""
        shutil.rmtree(self.folder_of(version), ignore_errors=True)

    def keep(self, versions: Collection[str]) -> None:
        """Remove the copies and logs of all other versions; what cannot be removed stays."""
        for folder in self._folder.glob("v*"):
            if folder.name.removeprefix("v") not in versions:
                shutil.rmtree(folder, ignore_errors=True)
        name = re.compile(rf"serve-{re.escape(self._lineage)}-v(\d+)\.log(\.1)?")
        for log in self._logs.glob("serve-*"):
            found = name.fullmatch(log.name)
            if found and found[1] not in versions:
                with suppress(OSError):
                    log.unlink()

    def close(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._lock.release()
