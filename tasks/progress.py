"""Report a run's progress, run its stages in threads, and stop the run.

Stages report to the reporter of the current context: a command shows bars and lines, a worker writes log lines. A
thread cannot be killed, so a run that was asked to stop ends in the callbacks of `advance`.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any, ParamSpec, Protocol, TypeVar

import httpx
import tenacity

logger = logging.getLogger(__name__)
Inputs = ParamSpec("Inputs")
Output = TypeVar("Output")
PATIENCE_SECONDS = 180.0


class Interrupted(Exception):  # noqa: N818 - a request, not an error
    """The user asked the run to stop. A new start continues from the last checkpoint."""


class Reporter(Protocol):
    """Receives the progress of a run. Worker threads call the methods."""

    def stage_started(self, stage: str) -> None:
        """A stage started."""

    def advanced(self, stage: str, done: float, total: float | None, detail: str = "") -> None:
        """`done` of `total` units of a stage are finished."""

    def stage_finished(self, stage: str, seconds: float, detail: str) -> None:
        """A stage ended. `detail` is its result in a few words."""

    def said(self, message: str) -> None:
        """A message of one line."""


class LogReporter:
    """Writes the progress as log lines, for workers and tests."""

    def stage_started(self, stage: str) -> None:
        """Log at level info."""
        logger.info("%s started", stage)

    def advanced(self, stage: str, done: float, total: float | None, detail: str = "") -> None:
        """Log at level debug."""
        logger.debug("%s %s/%s %s", stage, done, total, detail)

    def stage_finished(self, stage: str, seconds: float, detail: str) -> None:
        """Log at level info."""
        logger.info("%s finished in %.1f s: %s", stage, seconds, detail)

    def said(self, message: str) -> None:
        """Log at level info."""
        logger.info("%s", message)


class QuietReporter:
    """Calls a function for each finished stage and one for each remark, and none for the progress within a stage."""

    def __init__(self, on_stage: Callable[[str, float, str], object], on_remark: Callable[[str], object]) -> None:
        self._on_stage, self._on_remark = on_stage, on_remark

    def stage_started(self, stage: str) -> None:
        """Call nothing."""

    def advanced(self, stage: str, done: float, total: float | None, detail: str = "") -> None:
        """Call nothing."""

    def stage_finished(self, stage: str, seconds: float, detail: str) -> None:
        """Call the function for stages."""
        self._on_stage(stage, seconds, detail)

    def said(self, message: str) -> None:
        """Call the function for remarks."""
        self._on_remark(message)


@dataclass
class _Context:
    reporter: Reporter = field(default_factory=LogReporter)
    stop: threading.Event = field(default_factory=threading.Event)


_current: ContextVar[_Context | None] = ContextVar("deal_progress", default=None)
_times: ContextVar[dict[str, float] | None] = ContextVar("deal_stage_times", default=None)


def _context() -> _Context:
    """The current context. Without one, as on a worker, a new context that threads started from here share."""
    context = _current.get()
    if context is None:
        context = _Context()
        _current.set(context)
    return context


@contextmanager
def reporting_to(reporter: Reporter) -> Iterator[threading.Event]:
    """Send the progress of the block to `reporter`. Set the returned event to stop the run at its next step."""
    context = _Context(reporter=reporter)
    token = _current.set(context)
    try:
        yield context.stop
    finally:
        _current.reset(token)


def reporter() -> Reporter:
    """Return the reporter of the current context."""
    return _context().reporter


def ask_to_stop() -> None:
    """Stop the run of the current context at its next step."""
    _context().stop.set()


def is_stopped() -> bool:
    """Whether the run was asked to stop."""
    return _context().stop.is_set()


def raise_if_stopped() -> None:
    """Raise Interrupted if the run was asked to stop."""
    if is_stopped():
        raise Interrupted


def advance(stage: str, total: float | None = None) -> Callable[..., None]:
    """Return a callback `(done, total=total, detail="")` that reports the progress of `stage`.

    Raises:
        Interrupted: From the callback: the run was asked to stop.
    """
    context = _context()  # the caller's context; the callback may run in another thread

    def callback(done: float, total: float | None = total, detail: str = "") -> None:
        if context.stop.is_set():
            raise Interrupted
        context.reporter.advanced(stage, done, total, detail)

    return callback


async def to_the_end(call: Callable[Inputs, Output], *args: Inputs.args, **kwargs: Inputs.kwargs) -> Output:
    """Run a call in a thread. If this is cancelled, as by SIGTERM, ask the run to stop, and wait for the thread.

    Only the call itself can end its thread. Until then it uses what the caller holds, such as a lineage.
    """
    whole = partial(copy_context().run, partial(call, *args, **kwargs))
    working = asyncio.get_running_loop().run_in_executor(None, whole)
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        from anyio import CancelScope

        ask_to_stop()
        with CancelScope(shield=True), suppress(Exception):  # Prefect cancels every wait again, until its scope ends
            await working
        raise


def time_stages() -> None:
    """Begin to count the times of stages, for a run that starts now."""
    _times.set({})


def stage_times() -> dict[str, float]:
    """Return for each stage since `time_stages` the seconds of all its tries."""
    return dict(_times.get() or {})


async def in_stage(name: str, call: Callable[Inputs, Output], *args: Inputs.args, **kwargs: Inputs.kwargs) -> Output:
    """Run a call as a stage: in a thread and to its end, with its start reported and its time counted."""
    raise_if_stopped()
    reporter().stage_started(name)
    times, started = _times.get(), time.perf_counter()
    if times is None:
        _times.set(times := {})
    try:
        return await to_the_end(call, *args, **kwargs)
    finally:
        times[name] = times.get(name, 0.0) + time.perf_counter() - started


def stage_done(name: str, detail: str) -> None:
    """Report the result of a stage in a few words."""
    reporter().stage_finished(name, stage_times()[name], detail)


def staged(
    name: str, describe: Callable[[Any], str] | None = None
) -> Callable[[Callable[Inputs, Output]], Callable[Inputs, Coroutine[Any, Any, Output]]]:
    """Make a function a stage that is awaited; see `in_stage`. `describe` gives its result in a few words."""

    def decorate(function: Callable[Inputs, Output]) -> Callable[Inputs, Coroutine[Any, Any, Output]]:
        @wraps(function)
        async def run(*args: Inputs.args, **kwargs: Inputs.kwargs) -> Output:
            output = await in_stage(name, function, *args, **kwargs)
            if describe is not None:
                stage_done(name, describe(output))
            return output

        return run

    return decorate


patient = tenacity.retry(
    retry=tenacity.retry_if_exception_type(httpx.TransportError),
    wait=tenacity.wait_exponential(multiplier=0.5, max=10.0) + tenacity.wait_random(0.0, 1.0),
    stop=tenacity.stop_after_delay(PATIENCE_SECONDS),
    before_sleep=tenacity.before_sleep_log(logging.getLogger(__name__), logging.WARNING),
    reraise=True,
)
"""Decorator: calls a function, plain or async, again until the Prefect server answers, for up to three minutes."""
