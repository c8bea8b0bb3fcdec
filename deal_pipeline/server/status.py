"""`deal status`: the processes of `deal server up`, the lineages, and the runs on the Prefect server.

Prefect is imported only where a server may be named, because the import takes a second of processor time.
"""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel

from deal_core.errors import DealError, in_one_line
from deal_core.safe_text import without_secrets
from deal_core.shown import Shown
from deal_pipeline.server.local_processes import read_stack
from infra.branches import Branches
from infra.lineage_state import Batch, LineageState, read_ended, read_state
from infra.mirror_note import waiting as missing_in_mlflow
from infra.promotions import PromotionLog
from infra.run_journal import RunJournal
from infra.store.base import ObjectStore
from infra.store.keys import INBOX
from infra.store.opening import open_store
from infra.versions import Version, Versions, champion_of
from tasks.arrival_queue import is_of
from tasks.arrivals import HeldArrival, held_arrivals, plan_now, sense_inbox
from tasks.context import lineages_at_work
from tasks.housekeeping.damage import find_damage
from tasks.inbox import InboxLook, look
from tasks.lineage.consolidation import why_due
from tasks.lineage.history import known_lineages
from tasks.lineage.record import LineageRecord, read_record
from tasks.lineage.retrain import Waiting
from tasks.lineage.settings import WatchedLineage, read_lineages
from tasks.lineage.version_files import require_undamaged_adapter

if TYPE_CHECKING:
    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.objects import FlowRun, StateType

NEWEST = 20
"""Runs of each kind, and files, that are shown."""
DAY = timedelta(days=1)


def time_since(when: datetime) -> str:
    """Return the time since then in its largest unit that is not 0."""
    seconds = (datetime.now(UTC) - when).total_seconds()
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


class RunStatus(BaseModel, frozen=True):
    """A run on the Prefect server."""

    name: Annotated[str, Shown("run")]
    state: Annotated[str, Shown()]
    """The state's name in Prefect."""
    since: Annotated[datetime, Shown("for", format=time_since)]
    """When the run began or should have begun."""
    message: Annotated[str, Shown("why")]
    """What Prefect says of the state."""
    run_id: str


class ServerRuns(BaseModel, frozen=True):
    """The runs on the Prefect server; without a server none."""

    prefect_url: str | None = None
    """Address of the server; None: no server is set."""
    running: tuple[RunStatus, ...] = ()
    waiting: tuple[RunStatus, ...] = ()
    """Runs that are due and have not begun."""
    failed: tuple[RunStatus, ...] = ()
    """Failed runs of the last 24 hours, newest first."""


class PartStatus(BaseModel, frozen=True):
    """A process of `deal server up`."""

    name: Annotated[str, Shown("process")]
    is_alive: Annotated[bool, Shown("state", words={True: "up", False: "gone"}, is_state=True)]
    log: Annotated[str, Shown()]
    """Path of its log."""


class LineageStatus(BaseModel):
    """The state of a lineage."""

    lineage: Annotated[str, Shown()]
    champion: Annotated[str | None, Shown()] = None
    """The version that serves; None: no version does."""
    run: str | None = None
    """The run that works on it in this home, a command's or a worker's, in one line; None: no run does."""
    num_open: Annotated[int | None, Shown("open arrivals")] = None
    """Number of arrivals to learn; None: the lineage does not learn from the inbox automatically."""
    failed: tuple[str, ...] = ()
    """Arrivals that were refused or failed, each with the reason and the condition for a new try."""
    held: Annotated[str | None, Shown("paused")] = None
    """Why the lineage learns nothing that lands; None: it learns."""
    held_arrivals: tuple[HeldArrival, ...] = ()
    """Arrivals that wait for `deal data release`: a run was cancelled, or labels disagree with the champion."""
    debts: dict[str, float] = {}
    """Points that each task of the champion has lost since it was learned; below 0: gained."""
    budget_points: float | None = None
    """The forgetting budget of its file, gate.max_total_drop_points; None: it has none."""
    consolidation: str | None = None
    """Why the next run consolidates the lineage; None: it does not."""
    waiting: tuple[Waiting, ...] = ()
    """The files that have landed, by task, and when they are learned; empty if nothing has to wait for this lineage."""
    monitor: str | None = None
    """The last look at the champion's live traffic, in one line; None: there was none."""
    rollout: str | None = None
    """The version that is tried on live traffic, in one line; None: no version is tried."""
    branch: str | None = None
    """Why new arrivals wait for versions that are made again, in one line; None: there are no such versions."""
    rejected: str | None = None
    """The newest version and why it was rejected, in one line; None: it was not."""
    mlflow_waiting: tuple[str, ...] = ()
    """What the store has and MLflow lacks."""


class Status(ServerRuns, frozen=True):
    """All findings of `deal status`."""

    mlflow_url: str | None
    """Address of the MLflow server that `deal server up` has started; None: it has not."""
    parts: tuple[PartStatus, ...]
    lineages: tuple[LineageStatus, ...]
    problems: tuple[str, ...]
    """Invalid lineage files, unusable keys in the inbox, and a Prefect server that does not answer."""
    damaged: tuple[str, ...] = ()
    """Missing or damaged champions, versions, manifests and test rows, and a store that cannot be read."""


async def read_status(home: Path, environment: Mapping[str, str] = os.environ) -> Status:
    """Read the state of the processes, of the lineages and, if the environment names a server, of its runs."""
    stack = read_stack(home)
    parts = stack.parts if stack else []
    problems: list[str] = []
    damaged: list[str] = []
    server = await read_server(problems, environment)
    lineages = _lineages(problems, damaged)
    return Status(
        **vars(server),
        mlflow_url=stack.mlflow_url if stack else None,
        parts=[PartStatus(name=part.name, is_alive=part.is_alive(), log=str(part.log)) for part in parts],
        lineages=lineages,
        problems=problems,
        damaged=damaged,
    )


def _lineages(problems: list[str], damaged: list[str]) -> list[LineageStatus]:
    """Return the state of each lineage that has a settings file or data in the store; append findings to the lists."""
    try:
        store = open_store()
        lineages, inbox, known = read_lineages(store), look(store), known_lineages(store)
        problems += _unusable_files(store, inbox)
    except DealError as error:
        damaged.append(in_one_line(error))
        return []
    problems += [f"Lineage {name} is left out: {why}" for name, why in lineages.problems.items()]
    watched = {lineage.lineage: lineage for lineage in lineages.good}
    at_work = lineages_at_work()
    return [
        _lineage(store, name, watched.get(name), inbox, damaged, is_at_work=name in at_work)
        for name in dict.fromkeys((*watched, *known, *at_work))
    ]


def _unusable_files(store: ObjectStore, inbox: InboxLook) -> list[str]:
    """Return a line for each of the first files with an unusable key, and the number of the other such files."""
    found = store.unusable_keys(INBOX)
    found |= {key: f"it {why}" for key, why in inbox.misplaced.items()}
    lines = [f"{key!r} in {store.uri} is skipped: {why}." for key, why in islice(found.items(), NEWEST)]
    more = len(found) - len(lines)
    return [*lines, f"{more} more files in the inbox are skipped."] if more else lines


def _lineage(
    store: ObjectStore,
    name: str,
    watched: WatchedLineage | None,
    inbox: InboxLook,
    damaged: list[str],
    *,
    is_at_work: bool,
) -> LineageStatus:
    """Return the state of a lineage; append its damage to `damaged`. A damaged part leaves the other parts readable."""
    problems: list[str] = []
    versions: tuple[Version, ...] = ()
    record: LineageRecord | None = None

    @contextmanager
    def noting_damage() -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever it is, the other parts and the other lineages are shown
            problems.append(in_one_line(error))

    with noting_damage():
        versions = Versions(store).all(name)
    champion = champion_of(versions)
    status = LineageStatus(lineage=name, champion=champion.version if champion else None)
    state: LineageState | None = None
    with noting_damage():
        state = read_state(store, name)
        status.held = state.paused
    if watched is not None:
        status.budget_points = watched.gate.max_total_drop_points
        with noting_damage():
            status.consolidation = why_due(watched.consolidate, versions, status.budget_points)
    if champion is not None:
        status.debts = dict(champion.debts)
        with noting_damage():
            record = read_record(store, champion)
        with noting_damage():
            require_undamaged_adapter(store, champion)
    with noting_damage():
        problems += find_damage(store, name, record)
    if is_at_work:
        with noting_damage():
            status.run = _run_of(store, name)
    with noting_damage():
        status.mlflow_waiting = missing_in_mlflow(store, name)
    looked = state.monitor if state else None
    if looked is not None and champion is not None and looked.version == champion.version:
        status.monitor = looked.line()
    with noting_damage():
        opened = PromotionLog(store).open_rollout(name)
        if opened is not None:
            since = f"{opened.when:%Y-%m-%d %H:%M} UTC"
            status.rollout = f"version {opened.version} is tried ({opened.rollout}) since {since}"
    with noting_damage():
        branch = Branches(store).open(name)
        status.branch = branch.why_waiting if branch else None
    if versions and versions[-1].is_rejected:
        newest = versions[-1]
        why = "A person refused it." if newest.accepted else " ".join(newest.reasons)
        status.rejected = f"version {newest.version} ({newest.task}) was rejected: {why}"
    if watched is not None and state is not None:
        with noting_damage():
            state = sense_inbox(store, watched, inbox, 0.0, is_reader=True)
            present = {arrival.key: arrival for arrival in inbox.of(watched.tasks)}
            now = datetime.now(UTC)
            status.num_open = sum(
                note.state in ("landed", "waiting", "claimed")
                or (note.state == "failed" and (batch := state.batch(note.batch)) is not None and batch.is_due(now))
                for key, note in state.arrivals.items()
                if key in present
            )
            failed = {
                key: f"{key}: {_reason(note.why, batch)}"
                for key, note in state.arrivals.items()
                if note.state == "failed" and key in present and (batch := state.batch(note.batch)) is not None
            }
            failed |= {
                key: f"{key}: {end.message} (Refused until the file, its task.yaml or its test rows change.)"
                for key, end in read_ended(store, name).items()
                # otherwise another file is there, or this one is to be tried with other test rows
                if end.outcome == "refused" and key in present and key not in state.arrivals
                if is_of(end, present[key])
            }
            status.failed = tuple(failed[key] for key in present if key in failed)  # in the order of the inbox
            if state.paused is None:
                status.waiting = plan_now(store, watched, state).waiting
    if state is not None:
        own = watched.tasks if watched is not None else ()  # empty: all
        status.held_arrivals = tuple(
            arrival
            for arrival in held_arrivals(state)
            if not own or arrival.task in own or arrival.key not in state.arrivals
        )
    # several of the looks above may find the same damage
    damaged += [f"Lineage {name}: {problem}" for problem in dict.fromkeys(problems)]
    return status


def _run_of(store: ObjectStore, lineage: str) -> str:
    """Return what the run learns that works on a lineage in this home."""
    run = next((run for run in reversed(RunJournal(store).all(lineage)) if run.state == "running"), None)
    if run is None:  # it reads its rows, or it makes no version
        return "a run works on it"
    return f"a run learns {run.task} ({run.num_rows['train']} training rows) since {run.started:%Y-%m-%d %H:%M} UTC"


def _reason(why: str, batch: Batch) -> str:
    """Return the reason why an arrival failed, and the condition for a new try."""
    if batch.due is None:
        return why  # contains the condition
    return f"{why} (Failed {batch.num_failed} times; it is tried again from {batch.due:%Y-%m-%d %H:%M} UTC on.)"


def may_name_a_server(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether anything may name a Prefect server: a variable, or a file that Prefect reads.

    Prefect itself says which server it is. It is asked only if this function returns True, or if it is imported anyway.
    """
    home = environment.get("PREFECT_HOME")
    if "prefect" in sys.modules or home is None:
        return True
    if any(environment.get(name) for name in ("PREFECT_API_URL", "PREFECT_PROFILE", "PREFECT_PROFILES_PATH")):
        return True
    if any(path.exists() for path in (Path(".env"), Path("prefect.toml"), Path(home).expanduser() / "profiles.toml")):
        return True
    try:
        return "prefect" in tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8")).get("tool", {})
    except FileNotFoundError:
        return False
    except (OSError, ValueError):  # Prefect says what is wrong with it
        return True


async def read_server(problems: list[str], environment: Mapping[str, str] = os.environ) -> ServerRuns:
    """Read the runs on the Prefect server, if there is one. One that does not answer is appended to `problems`."""
    if not may_name_a_server(environment):
        return ServerRuns()
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.objects import StateType
    from prefect.exceptions import PrefectException
    from prefect.settings import get_current_settings

    api = get_current_settings().api.url
    if not api:
        return ServerRuns()
    url, now = without_secrets(api.removesuffix("/api")), datetime.now(UTC)
    try:
        async with get_client() as client:
            return ServerRuns(
                prefect_url=url,
                running=await _newest(client, [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]),
                waiting=await _newest(client, [StateType.SCHEDULED], due=now),  # most are of a later time
                failed=await _newest(client, [StateType.FAILED, StateType.CRASHED], since=now - DAY),
            )
    except (httpx.HTTPError, PrefectException, RuntimeError) as error:
        problems.append(without_secrets(f"Prefect at {api} does not answer: {in_one_line(error)}"))
        return ServerRuns(prefect_url=url)


async def read_runs(
    client: PrefectClient,
    states: list[StateType],
    *,
    since: datetime | None = None,
    due: datetime | None = None,
    limit: int | None = None,
) -> list[FlowRun]:
    """Read the runs of this project's deployments that are in these states, newest first.

    They ended after `since`, and were expected to start before `due`.
    """
    from prefect.client.schemas import filters
    from prefect.client.schemas.sorting import FlowRunSort

    return await client.read_flow_runs(
        flow_run_filter=filters.FlowRunFilter(
            state=filters.FlowRunFilterState(type=filters.FlowRunFilterStateType(any_=states)),
            end_time=filters.FlowRunFilterEndTime(after_=since) if since else None,
            expected_start_time=filters.FlowRunFilterExpectedStartTime(before_=due) if due else None,
        ),
        deployment_filter=filters.DeploymentFilter(tags=filters.DeploymentFilterTags(all_=["deal"])),
        sort=FlowRunSort.START_TIME_DESC,
        limit=limit,
    )


async def _newest(client: PrefectClient, states: list[StateType], **times: datetime) -> list[RunStatus]:
    """Return the newest runs in these states. For `times` see `read_runs`."""
    return [
        RunStatus(
            name=run.name,
            state=run.state_name or "unknown",
            run_id=str(run.id),
            since=run.start_time or run.expected_start_time or datetime.now(UTC),
            message=without_secrets((run.state and run.state.message) or ""),
        )
        for run in await read_runs(client, states, limit=NEWEST, **times)
    ]
