"""A full disk: told from other failures, and said with what is full and how much is free."""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import unquote

from deal_core.errors import DiskFullError
from infra.settings import StoreSettings, TrackingSettings

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
SAID = (
    "no space left on device", "database or disk is full", "storagefull", "disk quota exceeded", "file too large",
    "not enough free disk space",
)  # fmt: skip
"""What libraries say of these, whose errors carry no number."""
LITTLE_BYTES = 1 << 20
"""A disk with less is taken for the reason of a failure that nobody expected."""
ROOM_BYTES = 32 << 20
"""What the home folder needs to begin a run: its databases and logs grow by 7 MB in a small one."""
ROOM_TO_REMOVE_BYTES = 4 << 20
"""What a command needs that makes room."""


def disk_full(error: BaseException) -> DiskFullError | None:
    """The error that says which disk is full, where that made `error` happen; else None.

    Args:
        error: what was raised, with what it was raised from.
    """
    if isinstance(error, DiskFullError):
        return error
    chain = list(_chain(error))
    found = next((each for each in chain if _is_full(each)), None)
    if found is None:
        return None
    # a copy that finds no room names its source first
    named = [name for each in chain if isinstance(each, OSError) for name in (each.filename, each.filename2)]
    paths = [Path(name) for name in named if isinstance(name, str)]
    return _full(min(paths, key=_free) if paths else fullest_place())


def disk_full_unexpected(error: Exception) -> DiskFullError | None:
    """As `disk_full`, but for an error that nobody expected: a disk that is all but full made it happen."""
    found = disk_full(error)
    if found is None and (place := fullest_place()) and _free(place) < LITTLE_BYTES:
        return _full(place)
    return found


def require_room(folder: Path, num_bytes: int) -> None:
    """Say that a disk is full before anything is begun that could not be ended.

    Raises:
        DiskFullError: there is less room than `num_bytes`.
    """
    if _free(folder) < num_bytes:
        raise _full(folder, f"; at least {num_bytes >> 20} MB are needed to begin")


def fullest_place() -> Path:
    """Of the folders that a run writes to, the one on the disk with the least room."""
    temporary = Path(tempfile.gettempdir())
    try:
        settings, tracking = StoreSettings(), TrackingSettings()
    except ValueError:  # settings that do not fit, which may be the very error that is looked into
        return temporary
    addresses = [settings.store_uri, tracking.artifact_uri, tracking.tracking_uri]
    local = [address for address in addresses if address.startswith(("file:///", "sqlite:///"))]
    places = [Path(unquote(address.partition("://")[2]).replace("//", "/")) for address in local]
    return min([settings.home, settings.cache_dir, temporary, *places], key=_free)


def _full(place: Path, why: str = "") -> DiskFullError:
    return DiskFullError(
        f"The disk of {place} is full: {_free(place) / (1 << 20):.1f} MB are free{why}. Make room (deal gc lists what "
        "may go), then run the same command again: it goes on from the last checkpoint."
    )


def _is_full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    said = str(error).lower()
    return any(text in said for text in SAID)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, and those that it was raised from or while."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _free(place: Path) -> int:
    """Bytes that may be written at a path; of its nearest folder where it is not there yet."""
    for folder in _with_parents(place.absolute()):
        try:
            return shutil.disk_usage(folder).free
        except OSError:
            continue
    return 0


def _with_parents(path: Path) -> Iterable[Path]:
    return (path, *path.parents)
