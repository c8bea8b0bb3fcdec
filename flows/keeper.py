"""The keeper of the local whole: starts again what died, until `deal down` ends it.

python -m flows.keeper HOME
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from flows.stack import KEEPER, Part, Stack, read_stack, start_part

LOOK_SECONDS = 2.0
PAUSE_SECONDS = 20.0
"""A part that dies again this soon waits so long."""

logger = logging.getLogger("deal.keeper")


def keep(home: Path) -> None:
    """Look after the parts for as long as there is a record of them."""
    started: dict[str, float] = {}
    while (stack := read_stack(home)) is not None:
        for part in list(stack.parts):
            soon = time.monotonic() - started.get(part.name, -PAUSE_SECONDS) < PAUSE_SECONDS
            if part.name != KEEPER and not part.is_alive() and not soon:
                _restart(home, stack, part)
                started[part.name] = time.monotonic()
        time.sleep(LOOK_SECONDS)


def _restart(home: Path, stack: Stack, part: Part) -> None:
    if part.name.endswith("-server"):  # what it left would hold its port; a worker's training may run to its end
        with suppress(OSError):
            os.killpg(part.pid, signal.SIGKILL)
    try:
        start_part(home, stack, part.name, part.command)
        logger.warning("%s had died and was started again", part.name)
    except OSError as error:
        logger.error("%s died and cannot be started: %s", part.name, error)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    keep(Path(sys.argv[1]))
