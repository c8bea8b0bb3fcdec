"""Consolidate: learn what is left of all arrivals of a lineage together, as one version that the gate judges.

`learn` of `flows.adapt` does it, so a run that was killed goes on in the same way. The command and the watch of a
lineage start it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from prefect import flow

from flows.adapt import learn
from flows.adapt_result import AdaptResult
from flows.lock import lock_lineage
from infra.branches import Head
from infra.lineage_state import read_ended, read_state
from infra.store.base import ObjectStore
from infra.store.opening import open_store
from infra.versions import Version, Versions, champion_of
from tasks.adaptation.consolidate import plan_consolidation
from tasks.adaptation.resume import find_parent, read_findings
from tasks.arrival_queue import is_of
from tasks.inbox import Arrival, InboxLook
from tasks.lineage.consolidation import ConsolidationPlan, Start, spent_by, why_due
from tasks.lineage.history import find_version
from tasks.lineage.record import read_record
from tasks.lineage.settings import WatchedLineage, stored_lineage
from tasks.notices import announcing_failure
from tasks.spec import AdaptSpec, parse


def plan(store: ObjectStore, lineage: str, start: Start | None = None) -> ConsolidationPlan:
    """Return what `consolidate` would learn; change nothing. For the arguments and errors see there."""
    champion = find_version(store, lineage, None)
    settings = stored_lineage(store, lineage)
    record = read_record(store, champion)
    spec = _spec_of(store, champion, settings)
    return plan_consolidation(store, champion, record, start or _start_of(settings), spec)


@flow(name="consolidate", flow_run_name="consolidate-{lineage}")
async def consolidate(lineage: str, start: Start | None = None) -> AdaptResult:
    """Learn what is left of all arrivals together, and let the gate judge the version against the champion.

    The settings are those of the lineage's file, or else those of the champion's run.

    Args:
        lineage: The lineage.
        start: Whether the training starts from the base model or from the champion; None: as the lineage's file says.

    Raises:
        ConfigError: The lineage cannot be consolidated.
        RegistryError: It has no champion.
    """
    store = open_store()
    async with lock_lineage(lineage):
        settings = stored_lineage(store, lineage)
        return await learn_together(store, lineage, start or _start_of(settings), settings)


@flow(name="consolidate-due", flow_run_name="consolidate-{spec.lineage}")
async def consolidate_locked(spec: WatchedLineage) -> AdaptResult:
    """Do what `consolidate` does, by the settings of a watch that holds the lineage."""
    return await learn_together(open_store(), spec.lineage, spec.consolidate.start, spec)


async def learn_together(
    store: ObjectStore, lineage: str, start: Start, settings: WatchedLineage | None
) -> AdaptResult:
    """Consolidate a lineage, and announce a failure. The caller holds the lineage."""
    async with announcing_failure(lineage, None):
        await find_parent(Head(lineage=lineage))  # the champion may change: a run that was killed is completed
        spec = _spec_of(store, find_version(store, lineage, None), settings)
    return await learn(store, spec, together=start)


class ConsolidationLook(NamedTuple):
    """What a watch has to do about consolidations of its lineage."""

    champion: str | None = None
    """Its number."""
    why: str | None = None
    """Why the champion is consolidated now, in one sentence; None: it is not."""
    again: Sequence[Arrival] = ()
    """The arrivals that the budget had rejected before the consolidation that is champion now."""

    @property
    def is_due(self) -> bool:
        """Whether there is anything to do."""
        return self.why is not None or bool(self.again)


def look_at_consolidation(store: ObjectStore, spec: WatchedLineage, inbox: InboxLook) -> ConsolidationLook:
    """Read the versions of a lineage, if its settings let it be consolidated, and say what is to be done."""
    if not spec.consolidate.is_on:
        return ConsolidationLook()
    versions, again = Versions(store).all(spec.lineage), list[Arrival]()
    champion = champion_of(versions)
    if champion is None:
        return ConsolidationLook()
    if spec.consolidate.when_spent and champion.is_consolidation:
        rejected = {version.version for version in spent_by(versions, champion.parent_version)}
        ended, opened = read_ended(store, spec.lineage), read_state(store, spec.lineage).arrivals
        ends = ((arrival, ended.get(arrival.key)) for arrival in inbox.of(spec.tasks) if arrival.key not in opened)
        again = [
            arrival
            for arrival, end in ends
            if end is not None and end.outcome == "rejected" and end.version in rejected and is_of(end, arrival)
        ]
    why = why_due(spec.consolidate, versions, spec.gate.max_total_drop_points)
    return ConsolidationLook(champion.version, why, again)


def _start_of(settings: WatchedLineage | None) -> Start:
    return (settings or WatchedLineage()).consolidate.start


def _spec_of(store: ObjectStore, champion: Version, settings: WatchedLineage | None) -> AdaptSpec:
    """The settings of a consolidation; its task is that of the champion's arrival, which only names it."""
    before = parse(AdaptSpec, read_findings(store, champion.adapter_uri).spec, f"version {champion.version}")
    return before if settings is None else settings.with_task(before.task)
