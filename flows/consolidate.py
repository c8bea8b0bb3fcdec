"""Consolidate: learn what is left of all arrivals of a lineage together, as one version that the gate judges.

The stages are those of `flows.adapt`, so a run that was killed goes on in the same way. The command and the watch of a
lineage start it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

from prefect import flow

from flows.adapt import AdaptResult, announcing_failure, failing, finish, result_of
from flows.lock import lock_lineage
from infra.lineage_state import read_ended, read_state
from infra.store.base import ObjectStore
from infra.versions import Version, Versions, champion_of
from tasks.adaptation import run as runs
from tasks.adaptation.consolidate import plan_consolidation
from tasks.adaptation.general import require_suites
from tasks.adaptation.resume import find_parent, read_findings
from tasks.adaptation.run import RunInputs, prepare
from tasks.adaptation.train import PLAIN
from tasks.arrival_states import is_of
from tasks.base import refuse_what_cannot_fit
from tasks.context import current_store
from tasks.inbox import Arrival, InboxLook
from tasks.lineage.choices import choose_adapter, choose_base, choose_strategy
from tasks.lineage.consolidation import ConsolidationPlan, Start, spent_by, why_due
from tasks.lineage.history import find_version
from tasks.lineage.record import read_record, require_same_base
from tasks.lineage.settings import WatchedLineage, stored_lineage
from tasks.mlflow_mirror import sync_lineage
from tasks.progress import Stages
from tasks.references import DatasetRef
from tasks.spec import AdaptSpec, parse


def plan(lineage: str, start: Start | None = None) -> ConsolidationPlan:
    """Return what `consolidate` would learn; change nothing. For the arguments and errors see there."""
    store = current_store()
    champion = find_version(store, lineage, None)
    settings = stored_lineage(store, lineage)
    record = read_record(store, champion)
    return plan_consolidation(store, champion, record, start or _start_of(settings), _spec_of(champion, settings))


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
    store = current_store()
    async with lock_lineage(lineage):
        settings = stored_lineage(store, lineage)
        return await learn_together(lineage, start or _start_of(settings), settings)


@flow(name="consolidate-due", flow_run_name="consolidate-{spec.lineage}")
async def consolidate_locked(spec: WatchedLineage) -> AdaptResult:
    """Do what `consolidate` does, by the settings of a watch that holds the lineage."""
    return await learn_together(spec.lineage, spec.consolidate.start, spec)


async def learn_together(lineage: str, start: Start, settings: WatchedLineage | None) -> AdaptResult:
    """Consolidate a lineage, and announce a failure. The caller holds the lineage."""
    stages, store = Stages(), current_store()
    async with announcing_failure(lineage, None):
        await stages.run("parent", find_parent, lineage)  # an interrupted move of the champion is completed
        await stages.run("mlflow", sync_lineage, store, lineage)  # somebody may have moved the alias there
        champion = find_version(store, lineage, None)
        spec = _spec_of(champion, settings)
        if champion.is_consolidation:  # such as one whose run was killed, and is complete now
            dataset = read_findings(champion.adapter_uri).dataset
            return _repeated(champion, dataset, "no arrival was learned since")
        record = read_record(store, champion)
        adapter, strategy = choose_adapter(spec, record), choose_strategy(spec, record)
        await asyncio.to_thread(require_suites, spec.evaluate)  # rather now than after the training
        planned = await stages.run("rows", plan_consolidation, store, champion, record, start, spec)
        stages.done("rows", f"{planned.num_rows} rows of {len(planned.arrivals)} arrivals")
        source, num_versions = choose_base(spec, record), len(record.matrix.trained)
        await asyncio.to_thread(
            refuse_what_cannot_fit, source, adapter, PLAIN, spec.method, spec.train, num_versions=num_versions
        )
        base = await stages.run("base", runs.identify_base, source, spec.train.quantize)
        stages.done("base", base.name)
        require_same_base(record, base)
        inputs = RunInputs(
            spec=spec,
            dataset=planned.as_dataset(record.matrix.trained[-1]),
            base=base,
            adapter=adapter,
            strategy=strategy,
            parent=champion,
            record=record,
            attempt=0,
            requeued_sha256=None,
            consolidation=planned,
        )
        # By the key a run that was interrupted goes on.
        if version := await stages.run("repeat", Versions(store).with_run_key, lineage, inputs.run_key):
            why = f"has learned the same rows with the same settings ({version.standing})"
            return _repeated(version, inputs.dataset, why)
        run = await stages.run("start", runs.start_run, inputs)
        async with failing(run):
            adaptation = await stages.run("start", prepare, inputs, run)
        return await finish(adaptation, stages)


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


def _spec_of(champion: Version, settings: WatchedLineage | None) -> AdaptSpec:
    """The settings of a consolidation; its task is that of the champion's arrival, which only names it."""
    before = parse(AdaptSpec, read_findings(champion.adapter_uri).spec, f"version {champion.version}")
    return before if settings is None else settings.with_task(before.task)


def _repeated(version: Version, dataset: DatasetRef, why: str) -> AdaptResult:
    message = f"Nothing to do: version {version.version} of {version.lineage} is a consolidation, and {why}."
    return result_of(version, dataset, status="repeat", message=message)
