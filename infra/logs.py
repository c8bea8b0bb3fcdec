"""Log files that many processes append to, one after another."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

MAX_BYTES = 10 << 20


def ready_log(log: Path) -> Path:
    """Make a log's folder, and give one that has grown past 10 MB the name LOG.1, in place of the one before.

    Call it before the log is opened. Whoever has it open writes on into the old one.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileNotFoundError):
        if log.stat().st_size > MAX_BYTES:
            os.replace(log, log.with_name(f"{log.name}.1"))
    return log
