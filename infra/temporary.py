"""Temporary folders in HOME/tmp: what a killed process leaves there may be rows; `deal gc` and `forget` find it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from infra.settings import HomeSettings

TEMPORARY = "tmp"


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A new, empty folder, gone afterwards; only its user can look into it."""
    place = HomeSettings().home / TEMPORARY
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place) as folder:
        yield Path(folder)
