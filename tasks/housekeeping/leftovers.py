"""Leftovers: what processes that were killed have left on this machine, half done; some of it may be rows."""

from __future__ import annotations

import shutil
import stat
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from infra.settings import HomeSettings
from infra.store.base import RESERVED, ObjectStore
from infra.store.local import FileStore
from infra.temporary import TEMPORARY
from tasks.housekeeping.garbage import Folder

SERVE = "serve"
"""Where `deal serve` of earlier releases kept the versions that it had fetched."""
AGE = timedelta(days=1)
"""What nobody has written to for so long has lost its process: all that is needed later is read at once."""


def find_leftovers(store: ObjectStore, now: datetime) -> list[Folder]:
    """Temporary folders, files that a folder store was taking in, and what earlier releases left in HOME/serve."""
    home = HomeSettings().home
    places = [home / TEMPORARY, home / SERVE]
    if isinstance(store, FileStore):
        places.append(store.root / RESERVED)
    found = []
    for path in sorted(path for place in places if place.is_dir() for path in place.iterdir()):
        with suppress(FileNotFoundError):  # its process has just done with it
            folder = local_folder(path)
            if folder.modified < now - AGE:
                found.append(folder)
    return found


def remove_local(address: str) -> None:
    """Remove a folder or file of this machine; one that is gone already is all right."""
    path = Path(address)
    with suppress(FileNotFoundError):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def local_folder(path: Path) -> Folder:
    """A folder or file of this machine.

    Raises:
        FileNotFoundError: a part of it went meanwhile.
    """
    stats = [each.lstat() for each in (path, *path.rglob("*"))]
    num_bytes = sum(found.st_size for found in stats if stat.S_ISREG(found.st_mode))
    return Folder(str(path), num_bytes, datetime.fromtimestamp(max(found.st_mtime for found in stats), UTC))
