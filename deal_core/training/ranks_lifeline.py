"""The end of the process that started this one, seen as the end of standard input."""

from __future__ import annotations

import os
import threading


def end_with_parent() -> None:
    """From now on end, at whatever point, when nobody has the other end of standard input any more.

    A process that is killed closes its pipes, and says nothing else.
    """
    threading.Thread(target=_wait, daemon=True).start()


def _wait() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)
