"""Watch: files that land in the inbox are adapted as they come, each content once."""

from __future__ import annotations

import asyncio

from prefect import flow
from pydantic import BaseModel, ConfigDict

from flows.arrivals import Seen, Taken
from flows.results import AdaptResult
from tasks.context import current_store
from tasks.inbox.listing import INBOX
from tasks.progress import Interrupted, is_stopped, reporter
from tasks.spec import LineageSpec


class WatchResult(BaseModel):
    """What a watch that ended has handled."""

    model_config = ConfigDict(frozen=True)

    lineage: str
    files: tuple[Seen, ...]
    runs: tuple[AdaptResult, ...] = ()
    """Of a watch that ends once everything is handled; empty of any other."""

    @property
    def num_refused(self) -> int:
        """Files that were refused, or whose run failed."""
        return sum(seen.outcome in ("refused", "failed") for seen in self.files)

    @property
    def num_rejected(self) -> int:
        """Files whose version the gate rejected."""
        return sum(seen.outcome == "rejected" for seen in self.files)


@flow(name="watch", flow_run_name="watch-{spec.lineage}")
async def watch(
    spec: LineageSpec, tasks: tuple[str, ...] = (), once: bool = False, poll_seconds: float = 2.0
) -> WatchResult:
    """Adapt a lineage to what lands in the inbox.

    Args:
        spec: the lineage and how it learns; each file's task and schema come from where it lies.
        tasks: look at these tasks' files only; none: at all.
        once: end when everything that is there has been handled.
        poll_seconds: pause between two looks; a file that changes between two looks is left alone.

    Raises:
        Interrupted: with `once`, the user asked it to stop before everything was handled.
    """
    store = current_store()
    taken = Taken(keeps_runs=once)
    if not once:
        reporter().said(f"Watching {store.uri_of(INBOX)}/TASK/FILE; Ctrl-C ends it.")
    while True:
        num_taken = await taken.take(
            store, spec, tasks, settle_seconds=poll_seconds, retry_now=once, wait=True
        )
        if once and taken.num_left and is_stopped():
            raise Interrupted
        if is_stopped() or (once and not taken.num_left):
            return WatchResult(lineage=spec.lineage, files=tuple(taken.files), runs=tuple(taken.runs))
        if num_taken or not taken.files:
            reporter().stage_started("waiting")
        await asyncio.sleep(poll_seconds)
