"""The work folders and the locks of the present place (`infra.settings.at_place`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from deal_core.errors import ConfigError
from infra.settings import HomeSettings


def work_folder(lineage: str, short_key: str) -> Path:
    """Return the folder of a run's checkpoints and results. A run that starts again finds the folder by its key."""
    return HomeSettings().home / "work" / lineage / short_key


def lineage_lock(lineage: str) -> Path:
    """Return the file that a run locks while it works on a lineage in this home."""
    return HomeSettings().home / "locks" / f"{lineage}.lock"


def lineages_at_work() -> tuple[str, ...]:
    """Return the lineages on which a run works in this home. A run that was killed works no more."""
    names = []
    for lock in sorted(lineage_lock("x").parent.glob("*.lock")):
        try:
            with FileLock(lock).acquire(timeout=0):
                pass
        except Timeout:
            names.append(lock.stem)
        except OSError:  # another user's home, say
            continue
    return tuple(names)


@contextmanager
def only_process(lock: Path, busy: str) -> Iterator[None]:
    """Raise ConfigError with the message `busy` if another process is in a block with this lock file."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        held = FileLock(lock).acquire(timeout=0)
    except Timeout:
        raise ConfigError(busy) from None
    with held:
        yield
