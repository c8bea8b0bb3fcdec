"""A part of a file that can be read apart."""

from __future__ import annotations

from typing import NamedTuple


class Part(NamedTuple):
    """A part of a file: some row groups of Parquet. A text has only one part."""

    start: int = 0
    stop: int = 2**31
    """The first row group, and the one after the last; there may be fewer."""
    number: int = 1
    """Number of the first row."""


WHOLE = Part()
