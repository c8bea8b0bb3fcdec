"""Full disks: finds them behind other errors, and names the full place and its free bytes."""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from deal_core.errors import DiskFullError
from infra.settings import StoreSettings, TrackingSettings

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FULL_TEXTS = (
    "no space left on device",
    "database or disk is full",
    "storagefull",
    "disk quota exceeded",
    "file too large",
    "not enough free disk space",
)
"""Texts of libraries whose errors have no number."""
LITTLE_BYTES = 1 << 20
"""With less free space, a full disk counts as the cause of an unexpected error."""
ROOM_BYTES = 32 << 20
"""Free space in the home folder that a run needs to begin: its databases and logs grow by 7 MB in a small run."""
ROOM_TO_REMOVE_BYTES = 4 << 20
"""Free space that a command needs to remove files."""


def disk_full(error: BaseException) -> DiskFullError | None:
    """Return an error that names the full disk, if a full disk caused `error` or one of its causes; else None."""
    if isinstance(error, DiskFullError):
        return error
    chain = list(_chain(error))
    if not any(
        (isinstance(cause, OSError) and cause.errno in FULL) or any(text in str(cause).lower() for text in FULL_TEXTS)
        for cause in chain
    ):
        return None
    # the error of a failed copy names the source first, so the named place with the least space is taken
    named = [name for cause in chain if isinstance(cause, OSError) for name in (cause.filename, cause.filename2)]
    paths = [Path(name) for name in named if isinstance(name, str)]
    return _full_error(min(paths, key=_free) if paths else fullest_place())


def disk_full_unexpected(error: Exception) -> DiskFullError | None:
    """Like `disk_full`, but for an unexpected error, which an almost full disk may have caused."""
    full = disk_full(error)
    if full is None and _free(place := fullest_place()) < LITTLE_BYTES:
        return _full_error(place)
    return full


def require_room(folder: Path, num_bytes: int) -> None:
    """Raise DiskFullError if less than `num_bytes` are free, before work begins that a full disk would interrupt."""
    if _free(folder) < num_bytes:
        raise _full_error(folder, f"; at least {num_bytes >> 20} MB are needed to begin")


def fullest_place() -> Path:
    """Return the folder with the least free space of the folders that a run writes to."""
    temporary = Path(tempfile.gettempdir())
    try:
        settings, tracking = StoreSettings(), TrackingSettings()
    except ValueError:  # invalid settings may be the error that is examined
        return temporary
    addresses = [settings.store_uri, tracking.artifact_uri, tracking.tracking_uri]
    local = [address for address in addresses if address.startswith(("file:///", "sqlite:///"))]
    places = [Path(unquote(address.partition("://")[2]).replace("//", "/")) for address in local]
    return min([settings.home, settings.cache_dir, temporary, *places], key=_free)


def _full_error(place: Path, why: str = "") -> DiskFullError:
    return DiskFullError(
        f"The disk of {place} is full: {_free(place) / (1 << 20):.1f} MB are free{why}. Free some space (deal data gc "
        "lists files that can be removed), then run the same command again: it continues from the last checkpoint."
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and its causes."""
    seen: set[int] = set()  # each of two errors may be the cause of the other
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _free(place: Path) -> int:
    """Return the free bytes at a path, or at its nearest existing folder."""
    place = place.absolute()
    for folder in (place, *place.parents):
        try:
            return shutil.disk_usage(folder).free
        except OSError:
            continue
    return 0
