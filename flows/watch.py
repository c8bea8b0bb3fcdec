"""Watch: files that land in the inbox are adapted as they come, each content once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import PurePosixPath

import yaml
from prefect import flow
from pydantic import BaseModel, ConfigDict

from deal_core.errors import ConfigError, DataValidationError
from flows.adapt import adapt
from flows.results import AdaptResult
from flows.screens import in_one_line
from flows.spec import LineageSpec, TaskFields, TaskSpec, parse
from infra.object_store import ObjectInfo, ObjectStore
from tasks.inbox import (
    INBOX,
    TASK_FILE,
    Handled,
    InboxState,
    Outcome,
    list_arrivals,
    list_beside,
    read_state,
    split_settled,
    stamp_of,
    task_of,
    write_state,
)
from tasks.progress import Interrupted, is_stopped, reporter
from tasks.services import current_store

logger = logging.getLogger(__name__)


class TaskFile(TaskFields):
    """`inbox/<task>/task.yaml`: what is known of a task before its first arrival."""

    test_data: str | None = None
    """Name of the file beside it whose rows are all test rows; it is no arrival of its own."""


class Seen(BaseModel):
    """A file and what became of it."""

    model_config = ConfigDict(frozen=True)

    key: str
    outcome: str
    message: str
    version: str | None


class WatchResult(BaseModel):
    """What a watch that ended has handled."""

    model_config = ConfigDict(frozen=True)

    lineage: str
    files: tuple[Seen, ...]
    runs: tuple[AdaptResult, ...]

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
    """
    store = current_store()
    files: list[Seen] = []
    runs: list[AdaptResult] = []
    seen: dict[str, str] = {}
    if not once:
        reporter().said(f"Watching {store.uri_of(INBOX)}/TASK/FILE; Ctrl-C ends it.")
    while True:
        state = read_state(store, spec.lineage)
        now = datetime.now(UTC)
        listing = list(store.list(INBOX))
        companions = tuple(_companions(store, listing))
        beside = list_beside(listing, companions)
        stamps = {task: each.stamp for task, each in beside.items()}
        landed = [info for info in list_arrivals(listing, companions) if not tasks or task_of(info.key) in tasks]
        arrivals = [
            info for info in landed
            if state.is_open(info, now, beside=stamps.get(task_of(info.key), ""), retry_now=once)
        ]  # fmt: skip
        settled, growing = split_settled(arrivals, seen, now, poll_seconds, beside)
        for info in settled:
            if is_stopped():
                break
            handled, run = await _handle(store, spec, state, info, stamps.get(task_of(info.key), ""))
            write_state(store, spec.lineage, state)
            files.append(Seen(key=info.key, outcome=handled.outcome, message=handled.message, version=handled.version))
            runs += [run] if run else []
        if is_stopped() or (once and not growing):
            return WatchResult(lineage=spec.lineage, files=tuple(files), runs=tuple(runs))
        seen = {info.key: stamp_of(info, beside.get(task_of(info.key))) for info in arrivals}
        if settled or not files:
            reporter().stage_started("waiting")
        await asyncio.sleep(poll_seconds)


async def _handle(
    store: ObjectStore, spec: LineageSpec, state: InboxState, info: ObjectInfo, beside: str
) -> tuple[Handled, AdaptResult | None]:
    """Adapt to one file; a file that cannot be used is noted, so that it is reported once."""
    reporter().said(f"{info.key.removeprefix(INBOX + '/')} has landed")
    run: AdaptResult | None = None
    version: str | None = None
    outcome: Outcome
    try:
        run = await adapt(spec.with_task(_task_spec(store, info.key)))
        outcome, message, version = run.status, run.message, run.version
    except (DataValidationError, ConfigError) as error:
        outcome, message = "refused", in_one_line(error)
        reporter().said(f"Refused: {message}")
    except Interrupted:
        raise
    except Exception as error:
        logger.exception("The run for %s failed", info.key)
        outcome, message = "failed", in_one_line(error)
        reporter().said(f"Failed: {message}")
    return state.record(info, outcome, message, now=datetime.now(UTC), beside=beside, version=version), run


def _task_spec(store: ObjectStore, key: str) -> TaskSpec:
    folder = PurePosixPath(key).parent
    fields = _read_task_file(store, str(folder / TASK_FILE))
    values = {"name": task_of(key), "data": store.uri_of(key), **fields.given()}
    if fields.test_data:
        values["test_data"] = store.uri_of(str(folder / fields.test_data))
    return parse(TaskSpec, values, store.uri_of(key))


def _companions(store: ObjectStore, listing: Iterable[ObjectInfo]) -> Iterable[str]:
    """Keys of the test files that task files name."""
    for info in listing:
        path = PurePosixPath(info.key)
        if path.name == TASK_FILE and len(path.parts) == 3:
            try:
                test_data = _read_task_file(store, info.key).test_data
            except ConfigError:
                continue  # said when an arrival of the task is handled
            if test_data:
                yield str(path.parent / test_data)


def _read_task_file(store: ObjectStore, key: str) -> TaskFile:
    if not store.exists(key):
        return TaskFile()
    try:
        values = yaml.safe_load(store.get_bytes(key).decode("utf-8")) or {}
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{store.uri_of(key)} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{store.uri_of(key)} holds no mapping of keys; see docs for what a task file may say.")
    return parse(TaskFile, values, store.uri_of(key))
