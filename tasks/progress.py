"""How a run reports its progress, runs its stages in threads, and is stopped.

The stages report to the reporter of the current context: a command shows bars and lines, a worker writes log lines. The
callbacks of `advance` are also the places where a run stops if it was asked to, because nothing can kill a thread.
`patient` bridges a Prefect server that is away.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import ParamSpec, Protocol, TypeVar

import httpx
import tenacity

logger = logging.getLogger(__name__)
Inputs = ParamSpec("Inputs")
Output = TypeVar("Output")
PATIENCE_SECONDS = 180.0


class Interrupted(Exception):  # noqa: N818 - no error: somebody asked for it
    """The user asked the run to stop; it goes on from its last checkpoint when it is started again."""


class Reporter(Protocol):
    """Receives what happens in a run. Methods are called from worker threads."""

    def stage_started(self, stage: str) -> None:
        """A stage begins."""

    def advanced(self, stage: str, done: float, total: float | None, detail: str = "") -> None:
        """`done` of `total` units of a stage are through."""

    def stage_finished(self, stage: str, seconds: float, detail: str) -> None:
        """A stage ended; `detail` is its result in a few words."""

    def said(self, message: str) -> None:
        """Something worth a line of its own."""


class LogReporter:
    """Writes stages as log lines: what a worker or a test wants."""

    def stage_started(self, stage: str) -> None:
        """Log it."""
        logger.info("%s started", stage)

    def advanced(self, stage: str, done: float, total: float | None, detail: str = "") -> None:
        """Log it, for those who debug."""
        logger.debug("%s %s/%s %s", stage, done, total, detail)

    def stage_finished(self, stage: str, seconds: float, detail: str) -> None:
        """Log it."""
        logger.info("%s finished in %.1f s: %s", stage, seconds, detail)

    def said(self, message: str) -> None:
        """Log it."""
        logger.info("%s", message)


@dataclass
class _Context:
    reporter: Reporter = field(default_factory=LogReporter)
    stop: threading.Event = field(default_factory=threading.Event)


_current: ContextVar[_Context | None] = ContextVar("deal_progress", default=None)


def _context() -> _Context:
    """The current one; where nobody has made one, as on a worker, one that the threads started from here share."""
    context = _current.get()
    if context is None:
        context = _Context()
        _current.set(context)
    return context


@contextmanager
def reporting_to(reporter: Reporter) -> Iterator[threading.Event]:
    """Send what happens inside to `reporter`; setting the event that is returned stops the run at its next step."""
    context = _Context(reporter=reporter)
    token = _current.set(context)
    try:
        yield context.stop
    finally:
        _current.reset(token)


def reporter() -> Reporter:
    """The reporter of the current context."""
    return _context().reporter


def ask_to_stop() -> None:
    """Let the run of the current context end at its next step."""
    _context().stop.set()


def is_stopped() -> bool:
    """Whether the run was asked to stop."""
    return _context().stop.is_set()


def raise_if_stopped() -> None:
    """End here if the run was asked to stop.

    Raises:
        Interrupted: it was.
    """
    if is_stopped():
        raise Interrupted


def advance(stage: str, total: float | None = None) -> Callable[..., None]:
    """A callback `(done, total=None, detail="")` for code that reports progress of `stage`.

    Raises:
        Interrupted: from the callback, when the run was asked to stop.
    """
    context = _context()  # the caller's, whichever thread the callback runs in
    default_total = total

    def callback(done: float, total: float | None = None, detail: str = "") -> None:
        if context.stop.is_set():
            raise Interrupted
        context.reporter.advanced(stage, done, default_total if total is None else total, detail)

    return callback


class Stages:
    """The stages of one run and how long each took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    async def run(
        self, name: str, call: Callable[Inputs, Output], *args: Inputs.args, **kwargs: Inputs.kwargs
    ) -> Output:
        """Run one stage; what it has to say comes with `done`."""
        raise_if_stopped()
        reporter().stage_started(name)
        started = time.perf_counter()
        try:
            output = await asyncio.to_thread(call, *args, **kwargs)
        except asyncio.CancelledError:  # SIGTERM, say; nothing but the stage itself can end its thread
            ask_to_stop()
            raise
        self.seconds[name] = time.perf_counter() - started
        return output

    def done(self, name: str, detail: str) -> None:
        """Report the result of the stage that just ended, in a few words."""
        reporter().stage_finished(name, self.seconds[name], detail)


patient = tenacity.retry(
    retry=tenacity.retry_if_exception_type(httpx.TransportError),
    wait=tenacity.wait_exponential(multiplier=0.5, max=10.0) + tenacity.wait_random(0.0, 1.0),
    stop=tenacity.stop_after_delay(PATIENCE_SECONDS),
    before_sleep=tenacity.before_sleep_log(logging.getLogger(__name__), logging.WARNING),
    reraise=True,
)
"""Decorates a function, plain or async, that may be called again: three minutes without an answer are bridged."""
