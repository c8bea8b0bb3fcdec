"""The supervisor of the local servers: it restarts what died and keeps logs short, until `deal down` ends it.

python -m flows.server.supervisor HOME
"""

from __future__ import annotations

import logging
import sys
import time
from contextlib import suppress
from pathlib import Path

from flows.server.processes import kill_left_by
from flows.server.stack import KEEPER, hold_stack, read_stack, start_part
from infra.logs import cut_log, is_full

LOOK_SECONDS = 2.0
PAUSE_SECONDS = 20.0
"""A part that dies again this soon waits so long."""

logger = logging.getLogger("deal.keeper")


def keep(home: Path) -> None:
    """Look after the parts for as long as there is a record of them."""
    started: dict[str, float] = {}
    while (stack := read_stack(home)) is not None:
        for part in stack.parts:
            soon = time.monotonic() - started.get(part.name, -PAUSE_SECONDS) < PAUSE_SECONDS
            if part.name != KEEPER and not part.is_alive() and not soon:
                _restart(home, part.name)
                started[part.name] = time.monotonic()
            if is_full(part.log):
                with suppress(OSError), hold_stack(home):  # no room for the copy: the next look tries again
                    cut_log(part.log)
        time.sleep(LOOK_SECONDS)


def _restart(home: Path, name: str) -> None:
    try:
        with hold_stack(home):
            stack = read_stack(home)  # a `deal up` may have started the part meanwhile, a `deal down` ended all
            part = next((each for each in stack.parts if each.name == name), None) if stack else None
            if stack is None or part is None or part.is_alive():
                return
            if part.is_server:  # a worker's training may run to its end
                kill_left_by(part, home)
            start_part(home, stack, name, part.command)
            logger.warning("%s had died and was started again", name)
    except OSError as error:
        logger.error("%s died and cannot be started: %s", name, error)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    keep(Path(sys.argv[1]))
