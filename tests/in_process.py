"""Commands that run in the test's own process."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


class KilledError(BaseException):
    """Stands for the end of the process; KeyboardInterrupt would stop the event loop of the test too."""


@contextmanager
def put_back() -> Iterator[None]:
    """Undo at the end what commands set in this process: the environment, and where warnings go."""
    before = dict(os.environ)
    try:
        with warnings.catch_warnings():
            yield
    finally:
        logging.captureWarnings(False)
        os.environ.clear()
        os.environ.update(before)
