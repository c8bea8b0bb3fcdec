"""What a process of a job and whoever started it say to each other. This module imports little: launchers use it too.

A process writes messages to standard output, one JSON object a line, and may end when its standard input ends.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from deal_core.errors import DealError

LIFELINE = "--end-with-input"
"""Option of a process: it ends when its standard input ends."""
Send = Callable[[Mapping[str, Any]], None]
"""Takes a message for whoever started the job."""


def failure_of(error: DealError) -> dict[str, Any]:
    """The message about an error that a process raised on purpose."""
    return {"failure": {"rank": int(os.environ.get("RANK", 0)), "message": f"{type(error).__name__}: {error}"}}


def end_with_input() -> None:
    """End this process at once when the other end of standard input closes.

    The kernel closes the pipes of a killed process; a killed process gives no other sign.
    """

    def wait() -> None:
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def sending() -> Iterator[Send]:
    """Yield what writes messages to standard output; it has messages alone, as all prints go to standard error.

    An error of this project that ends the block is told as a message too.
    """
    messages = os.fdopen(os.dup(1), "w", encoding="utf-8")  # left open: who reads it may end this process at its end
    os.dup2(2, 1)

    def send(message: Mapping[str, Any]) -> None:
        messages.write(json.dumps(message) + "\n")
        messages.flush()

    try:
        yield send
    except DealError as error:
        send(failure_of(error))
        raise
