"""Commands that run in the test's own process."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from typer.testing import CliRunner


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


def deal(*words: str, code: int = 0) -> str:
    """What a command prints, which ends with this exit code: its result, or its errors too if the code is not 0."""
    from deal_pipeline.cli.app import app

    with put_back():
        done = CliRunner().invoke(app, list(words))
    assert done.exit_code == code, done.output
    return done.stdout if code == 0 else done.output


def deal_json(*words: str) -> Any:
    """The result of a command, as a program gets it."""
    return json.loads(deal(*words, "--json"))
