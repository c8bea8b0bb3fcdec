"""Adapt to what has landed: the run that a server starts when arrivals are announced."""

from __future__ import annotations

import asyncio

from prefect import flow, runtime

from flows.lock import LineageBusyError
from flows.watch import Taken, WatchResult
from tasks.context import current_store
from tasks.lineage.settings import read_lineage
from tasks.progress import is_stopped, reporter


@flow(name="adapt-landed", flow_run_name="adapt-landed-{lineage}")
async def adapt_landed(lineage: str, settle_seconds: float = 2.0) -> WatchResult:
    """Adapt a lineage to its open arrivals, oldest first, until there is none.

    It ends at once where another run is at it. If that is one of this flow it looks again before it ends, and sees what
    has landed meanwhile; after any other, what is still open is announced again. So a lineage that waits never takes a
    worker's place from one that could learn. A run that is started again after a crash does wait, as its own hold on
    the lineage may not be over yet.

    Args:
        lineage: its name; how it learns stands in the store, see `tasks.lineage.settings`.
        settle_seconds: how long a file must have been left alone.
    """
    store = current_store()
    spec = read_lineage(store, lineage)
    is_rerun = (runtime.flow_run.run_count or 1) > 1
    taken = Taken()
    try:
        while await taken.take(
            store, spec, spec.tasks, settle_seconds=settle_seconds, retry_now=False, wait=is_rerun
        ) or taken.num_left:
            if is_stopped():
                break
            if taken.num_left:
                await asyncio.sleep(settle_seconds)
    except LineageBusyError as busy:
        reporter().said(f"{busy} What has landed is learned after it.")
    return WatchResult(lineage=lineage, files=tuple(taken.files))
