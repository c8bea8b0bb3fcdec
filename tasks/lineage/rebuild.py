"""Rebuild: a lineage whose versions the registry has lost is registered again from the store.

Versions get their numbers, facts and aliases back, and new MLflow runs that keep scores, settings and reports. The
store is only read. The rebuild can be cut short and given again: until its end the registered model has a tag.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from deal_core.base_model.sources import resolve_base
from deal_core.errors import DealError, RegistryError, StoreError
from deal_core.masking import without_secrets
from infra.promotions import Move, PromotionLog
from infra.settings import HomeSettings
from infra.store.base import ObjectStore, temporary_folder
from infra.tracking.rebuilding import LineageRebuild
from infra.tracking.registry import Alias, Registry, open_registry
from infra.tracking.tracker import open_tracker
from infra.version_log import StoredVersion, VersionLog
from tasks.adaptation.register import log_adapter
from tasks.adaptation.report import write_report
from tasks.adaptation.resume import read_findings, report_findings
from tasks.context import current_store, run_tags
from tasks.lineage.adapters import borrowed_adapter
from tasks.lineage.older_versions import find_older
from tasks.lineage.record import read_record
from tasks.lineage.stored_lineage import stored_numbers
from tasks.lineage.versions import ref_by_facts, version_ref
from tasks.progress import advance, raise_if_stopped
from tasks.references import RunRef

logger = logging.getLogger(__name__)

SETTINGS = ("strategy", "adapter", "deal", "rehearsal", "rivals", "train", "evaluate", "data", "gate")
"""Parts of a run's spec that its MLflow run shows."""


class RebuildResult(BaseModel):
    """What was registered again."""

    model_config = ConfigDict(frozen=True)

    lineage: str
    versions: tuple[str, ...]
    left_out: tuple[str, ...]
    """Numbers that stay unused, since the store does not know enough of their versions."""
    aliases: dict[str, str]
    problems: tuple[str, ...]
    """What could not be brought back, and why."""


@dataclass(frozen=True)
class RebuildPlan:
    """What will be registered."""

    lineage: str
    versions: tuple[StoredVersion, ...]
    """Oldest first."""
    last: int
    """The highest number that the lineage has used."""
    moves: tuple[Move, ...]
    problems: tuple[str, ...]

    @property
    def left_out(self) -> tuple[str, ...]:
        """Numbers of the versions that cannot be registered."""
        known = {each.number for each in self.versions}
        return tuple(str(number) for number in range(1, self.last + 1) if number not in known)


def rebuild_lineage(lineage: str) -> RebuildResult:
    """Register the versions of a lineage again; whoever calls holds the lineage.

    Raises:
        RegistryError: the registry knows versions of the lineage, or the store none.
        StoreError: the promotion log, or what the store knows of a version, is damaged.
        ConfigError: a base model cannot be found; nothing was changed.
    """
    store, registry = current_store(), open_registry()
    rebuild = LineageRebuild(registry, lineage)
    rebuild.refuse_what_is_known()
    plan = plan_rebuild(store, lineage)
    if not plan.versions:
        raise RegistryError(_nothing_known(store, lineage, plan))
    problems = list(plan.problems)
    _require_bases(store, plan)
    tags = tags_after(plan.moves)
    rebuild.begin()
    report, runs = advance("rebuild", len(plan.versions)), {}
    for done, stored in enumerate(plan.versions):
        raise_if_stopped()
        report(done, detail=f"version {stored.version}")
        run, model_id = _log_run(store, stored, problems)
        runs[stored.version] = run
        more = {"created": stored.created.isoformat(), **_removed(stored), **tags.get(stored.version, {})}
        rebuild.make(stored.number, stored.facts, tracking_id=run.tracking_id, model_id=model_id, more=more)
    rebuild.leave_out(stored.number, plan.last, stored.facts, tracking_id=run.tracking_id, model_id=model_id)
    aliases = aliases_after(plan.versions, plan.moves)
    for stored in plan.versions:
        _end_run(registry, stored, runs[stored.version], problems)
    rebuild.end(aliases)
    return RebuildResult(
        lineage=lineage, versions=tuple(each.version for each in plan.versions), left_out=plan.left_out,
        aliases={str(alias): version for alias, version in aliases.items()}, problems=tuple(problems),
    )  # fmt: skip


def plan_rebuild(store: ObjectStore, lineage: str) -> RebuildPlan:
    """What the store knows of a lineage's versions: what was written of them, else what an older release left.

    Raises:
        StoreError: something of it is damaged.
    """
    log, moves = VersionLog(store), PromotionLog(store).moves(lineage)
    written = [log.read(lineage, number) for number in sorted(log.numbers(lineage))]
    older, problems = find_older(store, lineage, written, moves)
    versions = sorted([*written, *older], key=lambda stored: stored.number)
    last = max([*stored_numbers(store, lineage), *(stored.number for stored in versions)], default=0)
    return RebuildPlan(
        lineage=lineage, versions=tuple(versions), last=last, moves=tuple(moves), problems=tuple(problems)
    )


def tags_after(moves: Iterable[Move]) -> dict[str, dict[str, str]]:
    """What the promotion log's moves have made of versions, as tags by number."""
    found: dict[str, dict[str, str]] = {}
    for move in moves:
        own = found.setdefault(move.version, {})
        if move.action == "rejected":
            own |= {"refused_by": move.who, "refused_why": move.why, "approval": "refused"}
        if move.action == "promoted":
            own |= {"promoted": str(move.number)} | ({"approval": "given"} if move.run is None else {})
    return found


def aliases_after(versions: Sequence[StoredVersion], moves: Sequence[Move]) -> dict[Alias, str]:
    """Who carries which alias after the promotion log's moves; an alias of a version that is not there is left out.

    Challenger is the newest version that passed its gate and that its run has brought to the end.
    """
    tags = tags_after(moves)
    replaced = [move.before for move in moves if move.before is not None and move.before != move.champion]
    ended = [
        stored.version for stored in versions
        if stored.facts.accepted and (stored.facts.approval or tags.get(stored.version))
    ]  # fmt: skip
    wanted: dict[Alias, str | None] = {
        "champion": moves[-1].champion if moves else None,
        "previous": replaced[-1] if replaced else None,
        "challenger": ended[-1] if ended else None,
    }
    there = {stored.version for stored in versions if stored.facts.accepted}
    return {alias: version for alias, version in wanted.items() if version in there and version is not None}


def _nothing_known(store: ObjectStore, lineage: str, plan: RebuildPlan) -> str:
    where = without_secrets(store.uri)
    if not plan.last:
        return f"The store {where} knows no version of lineage '{lineage}'; check the name and DEAL_STORE_URI."
    why = f" {' '.join(plan.problems)}" if plan.problems else ""
    return (
        f"The store {where} has heard of {plan.last} versions of lineage '{lineage}', but knows too little of them to "
        f"register one again.{why} Restore MLflow's database from a backup, or start another lineage."
    )


def _require_bases(store: ObjectStore, plan: RebuildPlan) -> None:
    """See that the base models are at hand before anything is changed."""
    sources = set()
    for stored in plan.versions:
        with suppress(StoreError):  # it is told of where the version is registered
            sources.add(read_record(store, stored.facts.adapter_uri).base.source)
    for source in sorted(sources):
        resolve_base(source, HomeSettings().cache_dir)


def _log_run(store: ObjectStore, stored: StoredVersion, problems: list[str]) -> tuple[RunRef, str]:
    """The MLflow run of a version, with its settings and the adapter; what is damaged or gone is left out of it."""
    facts = stored.facts
    spec = _spec_of(facts.adapter_uri)
    params = {name: spec[name] for name in SETTINGS if spec.get(name) is not None}
    tags = run_tags(facts.task, facts.dataset_sha256, facts.base_sha256, facts.parent_version)
    tags |= {"deal.version": stored.version, "deal.rebuilt": "true"}
    tracked = open_tracker().start(stored.lineage, facts.run_key, name=facts.task, params=params, tags=tags)
    run = RunRef(lineage=stored.lineage, task=facts.task, run_key=facts.run_key, tracking_id=tracked.run_id)
    if stored.adapter_removed is None:
        try:
            version = ref_by_facts(stored.lineage, stored.version, facts)
            with borrowed_adapter(store, version, with_method=True) as folder:
                return run, log_adapter(run, facts.task, folder, read_record(store, facts.adapter_uri), facts)
        except DealError as error:
            problems.append(f"Version {stored.version} is in the history only: {error}")
    with temporary_folder() as folder:
        (folder / "README.md").write_text(
            "When this lineage was registered again, the adapter of this version was damaged, or not in the store.\n"
        )
        name = f"{stored.lineage}-{facts.task}"
        return run, tracked.log_adapter(folder, name, sha256=facts.adapter_sha256)


def _removed(stored: StoredVersion) -> Mapping[str, str]:
    return {"adapter_removed": stored.adapter_removed} if stored.adapter_removed else {}


def _spec_of(adapter_uri: str) -> Mapping[str, Any]:
    try:
        return dict((read_findings(adapter_uri) or {}).get("spec") or {})
    except StoreError:
        return {}


def _end_run(registry: Registry, stored: StoredVersion, run: RunRef, problems: list[str]) -> None:
    """Write scores and report of a version to its run, and end that."""
    tracked = open_tracker().run(run.tracking_id)
    try:
        findings = read_findings(stored.facts.adapter_uri)
        info = registry.version(stored.lineage, stored.version)
        if findings is not None and info is not None:
            report_findings(write_report, run, version_ref(info), info, findings)
    except Exception as error:  # whatever it is: a page must not cost the lineage its versions
        reason = without_secrets(str(error).split("\n")[0])
        logger.error("Cannot write the report of version %s again: %s", stored.version, reason)
        problems.append(f"Version {stored.version} has no report: {reason}")
    tracked.end("FINISHED")
