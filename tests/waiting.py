"""Waiting for an event, with a limit that no busy machine reaches."""

from __future__ import annotations

import time
from collections.abc import Callable

LONGEST = 600.0
"""Seconds."""


def wait_for(check: Callable[[], object], pause: float = 0.02) -> None:
    """Wait until a check is true."""
    deadline = time.monotonic() + LONGEST
    while not check():
        assert time.monotonic() < deadline, "what was waited for did not happen"
        time.sleep(pause)
