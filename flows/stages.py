"""Run the stages of a flow: each in a thread, so that leases and heartbeats go on, and each timed and reported."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from tasks.progress import ask_to_stop, raise_if_stopped, reporter

Inputs = ParamSpec("Inputs")
Output = TypeVar("Output")


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
