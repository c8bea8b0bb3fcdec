"""Run one flow in this process, with a Prefect API that ends with it and a Ctrl-C that ends the flow at a step."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from deal_core.errors import DealError

if TYPE_CHECKING:
    from tasks.progress import Reporter

Result = TypeVar("Result")
STOPPED = 130
"""Exit code of a process that Ctrl-C ended."""


def run_flow(
    start: Callable[[], Coroutine[Any, Any, Result]],
    home: Path,
    reporter: Reporter,
    *,
    makes_room: bool = False,
    trains: bool = False,
    in_prefect: bool = True,
) -> Result:
    """Run a flow and report its stages. Ctrl-C stops it at its next step, a second Ctrl-C ends the process at once.

    Args:
        start: imports the flow and gives its coroutine, while Prefect's API starts.
        home: the home folder, which this process has entered.
        reporter: gets the stages.
        makes_room: the flow removes more than it writes, so it may begin on a nearly full disk.
        trains: the flow needs torch, Transformers and PEFT. They are imported while the API starts.
        in_prefect: without it, `start` gives the coroutine of a flow's plain function. It needs no API, and so no room
            for the API's database.

    Raises:
        DatabaseError: Prefect's database is damaged.
        DiskFullError: the disk of the home folder is too full to begin.
        DealError: Prefect's API has not started.
        KeyboardInterrupt: the flow was stopped.
    """
    from deal_pipeline.server.embedded import API_SECONDS, calm_libraries, end_orphans, start_api
    from infra.disk import ROOM_BYTES, ROOM_TO_REMOVE_BYTES, require_room
    from tasks.progress import Interrupted, reporting_to

    if in_prefect:
        require_room(home, ROOM_TO_REMOVE_BYTES if makes_room else ROOM_BYTES)
        end_orphans(home)
    with reporting_to(reporter) as stop:
        gc.disable()  # modules stay, and collections that look at them are an eighth of the time of the imports
        try:
            from prefect.exceptions import TerminationSignal

            api = start_api() if in_prefect else None
            if trains and api is not None and not api.done():
                import deal_core.training.train  # noqa: F401
            coroutine = start()
        finally:
            gc.enable()
        calm_libraries()
        try:
            if api is not None:
                api.result(timeout=API_SECONDS)
        except TimeoutError:  # Prefect starts an API that ends at once again and again, without end
            coroutine.close()
            log = home / "logs" / "deal.log"
            raise DealError(f"Prefect's API has not started in {API_SECONDS} s; {log} says why.") from None
        previous = signal.getsignal(signal.SIGINT)

        def on_interrupt(number: int, frame: Any) -> None:
            if stop.is_set():  # nothing else ends threads; the files on the disk are always consistent
                os._exit(STOPPED)
            stop.set()
            reporter.said("Stopping at the next step; Ctrl-C again stops at once.")

        signal.signal(signal.SIGINT, on_interrupt)
        try:
            return asyncio.run(coroutine)
        except (Interrupted, TerminationSignal):
            raise KeyboardInterrupt from None
        finally:
            signal.signal(signal.SIGINT, previous)
