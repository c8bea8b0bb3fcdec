"""Rebuild: register a lineage again from the store after the registry lost its versions.

Versions get their numbers, facts and aliases back, and new MLflow runs with scores, settings and reports. The store is
only read. An interrupted rebuild can be repeated: the registered model has a tag until the rebuild is complete.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from deal_core.base_model.sources import resolve_base
from deal_core.errors import DealError, RegistryError, StoreError
from deal_core.safe_text import without_secrets
from infra.promotions import Move, PromotionLog
from infra.report.run_report import RunReport, kept_reports
from infra.settings import HomeSettings, TrackingSettings
from infra.store import keys
from infra.store.base import ObjectStore, temporary_folder
from infra.tracking.facts import Alias, VersionFacts
from infra.tracking.registry import LineageRebuild, Registry, open_registry
from infra.tracking.tracker import open_tracker
from infra.version_log import Ledger, StoredVersion, VersionLog
from tasks.adaptation.promote import tags_of
from tasks.adaptation.register import log_adapter
from tasks.adaptation.report import write_report
from tasks.adaptation.resume import read_findings, report_findings
from tasks.adaptation.start import run_tags
from tasks.context import current_store
from tasks.lineage.choices import LOGGED_PARTS
from tasks.lineage.history import stored_numbers
from tasks.lineage.record import RECORD_FILE, read_record, scores_of
from tasks.lineage.version_files import borrowed_adapter
from tasks.lineage.versions import ref_by_facts, version_ref
from tasks.progress import advance, raise_if_stopped
from tasks.references import RunRef

logger = logging.getLogger(__name__)


class RebuildResult(BaseModel):
    """The versions that were registered again."""

    model_config = ConfigDict(frozen=True)

    lineage: str
    versions: tuple[str, ...]
    left_out: tuple[str, ...]
    """Numbers that stay unused: the store has not enough facts about these versions."""
    aliases: dict[str, str]
    problems: tuple[str, ...]
    """One line for everything that could not be restored, with the reason."""


@dataclass(frozen=True)
class _Plan:
    """The versions that will be registered."""

    lineage: str
    versions: tuple[StoredVersion, ...]
    """Oldest first."""
    last: int
    """The highest number that the lineage has used."""
    moves: tuple[Move, ...]
    problems: tuple[str, ...]

    @property
    def left_out(self) -> tuple[str, ...]:
        known = {each.number for each in self.versions}
        return tuple(str(number) for number in range(1, self.last + 1) if number not in known)


def rebuild_lineage(lineage: str) -> RebuildResult:
    """Register the versions of a lineage again. The caller has locked the lineage.

    Raises:
        RegistryError: The registry has versions of the lineage, or the store has none.
        StoreError: The promotion log or a stored version is damaged.
        ConfigError: A base model cannot be found; nothing was changed.
    """
    store, registry = current_store(), open_registry()
    rebuild = LineageRebuild(registry, lineage)
    rebuild.refuse_what_is_known()
    plan = _plan_rebuild(store, lineage)
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
        removed = {"adapter_removed": stored.adapter_removed} if stored.adapter_removed else {}
        more = {"created": stored.created.isoformat(), **removed, **tags.get(stored.version, {})}
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


def _plan_rebuild(store: ObjectStore, lineage: str) -> _Plan:
    log, moves = VersionLog(store), PromotionLog(store).moves(lineage)
    written = [log.read(lineage, number) for number in sorted(log.numbers(lineage))]
    older, problems = _find_older(store, lineage, written, moves)
    versions = sorted([*written, *older], key=lambda stored: stored.number)
    last = max([*stored_numbers(store, lineage), *(stored.number for stored in versions)], default=0)
    return _Plan(lineage, tuple(versions), last, tuple(moves), tuple(problems))


def tags_after(moves: Iterable[Move]) -> dict[str, dict[str, str]]:
    """Return the tags that the promotion log's moves give to versions, by number."""
    found: dict[str, dict[str, str]] = {}
    for move in moves:
        found.setdefault(move.version, {}).update(tags_of(move))
    return found


def aliases_after(versions: Sequence[StoredVersion], moves: Sequence[Move]) -> dict[Alias, str]:
    """Return the aliases after the promotion log's moves. An alias of a missing version is left out.

    The challenger is the newest version that passed its gate and whose run is complete.
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


def _nothing_known(store: ObjectStore, lineage: str, plan: _Plan) -> str:
    where = without_secrets(store.uri)
    if not plan.last:
        return f"The store {where} knows no version of lineage '{lineage}'; check the name and DEAL_STORE_URI."
    why = f" {' '.join(plan.problems)}" if plan.problems else ""
    return (
        f"The store {where} has traces of {plan.last} versions of lineage '{lineage}', but not enough facts to "
        f"register any of them again.{why} Restore MLflow's database from a backup, or start another lineage."
    )


def _require_bases(store: ObjectStore, plan: _Plan) -> None:
    """Find the base models before anything is changed."""
    sources = set()
    for stored in plan.versions:
        with suppress(StoreError):  # `_log_run` reports the damage
            sources.add(read_record(store, stored.facts.adapter_uri).base.source)
    for source in sorted(sources):
        resolve_base(source, HomeSettings().cache_dir)


def _log_run(store: ObjectStore, stored: StoredVersion, problems: list[str]) -> tuple[RunRef, str]:
    """Make the MLflow run of a version with its settings and adapter. Damaged or missing parts are left out."""
    facts = stored.facts
    spec: Mapping[str, Any] = {}
    with suppress(StoreError):
        spec = (read_findings(facts.adapter_uri) or {}).get("spec") or {}
    params = {name: spec[name] for name in ("strategy", "adapter", *LOGGED_PARTS) if spec.get(name) is not None}
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


def _end_run(registry: Registry, stored: StoredVersion, run: RunRef, problems: list[str]) -> None:
    """Write the scores and the report of a version to its run, and end the run."""
    tracked = open_tracker().run(run.tracking_id)
    try:
        findings = read_findings(stored.facts.adapter_uri)
        info = registry.version(stored.lineage, stored.version)
        if findings is not None and info is not None:
            report_findings(write_report, run, version_ref(info), info, findings)
    except Exception as error:  # a failed report must not stop the rebuild
        reason = without_secrets(str(error).split("\n")[0])
        logger.error("Cannot write the report of version %s again: %s", stored.version, reason)
        problems.append(f"Version {stored.version} has no report: {reason}")
    tracked.end("FINISHED")


def _find_older(
    store: ObjectStore, lineage: str, written: Collection[StoredVersion], moves: Sequence[Move]
) -> tuple[list[StoredVersion], list[str]]:
    """Find versions of earlier releases, which are not in the version log; return one line for each that fails.

    The promotion log names promoted versions. Other versions are found only by reports in this machine's artifact
    folder.
    """
    reports = {report.origin.run_key[:16]: report for report in kept_reports(TrackingSettings(), lineage)}
    found, problems = [], []
    taken = {stored.version for stored in written}
    known = {stored.facts.adapter_uri for stored in written}
    for info in store.list(keys.adapters_folder(lineage)):
        folder, _, name = info.key.rpartition("/")
        if name != RECORD_FILE or folder in known:  # a run without a record did not register a version
            continue
        try:
            version = _older_version(store, lineage, folder, reports.get(keys.file_name(folder)), moves)
        except DealError as error:
            problems.append(str(error))
            continue
        if version is None or version.version in taken:
            problems.append(
                f"{store.uri_of(folder)} is not registered: neither the promotion log nor a report says which version "
                "it is."
            )
            continue
        taken.add(version.version)
        found.append(version)
    return found, problems


def _older_version(
    store: ObjectStore, lineage: str, folder: str, report: RunReport | None, moves: Sequence[Move]
) -> StoredVersion | None:
    """The version by its report, or else by the ledger's entry and the move that promoted it."""
    record, findings = read_record(store, folder), read_findings(folder) or {}
    dataset = findings.get("dataset", {})
    shared: dict[str, Any] = {
        "strategy": record.strategy, "base_sha256": record.base.sha256, "adapter_uri": folder,
        "landed_sha256": dataset.get("landed_sha256"), **scores_of(record.matrix),
    }  # fmt: skip
    if report is not None:
        origin = report.origin
        facts = VersionFacts(
            **shared, run_key=origin.run_key, task=report.task, dataset_sha256=origin.dataset_sha256,
            config_sha256=origin.config_sha256, adapter_sha256=origin.adapter_sha256,
            parent_version=report.parent_version, accepted=report.verdict != "rejected", reasons=report.reasons,
            approval="awaiting" if report.verdict == "awaiting-approval" else None,
        )  # fmt: skip
        return StoredVersion(lineage=lineage, version=report.version, created=report.created, facts=facts)
    if not dataset:
        return None
    entry = Ledger(store).find(lineage, dataset["sha256"])
    if entry is None or entry.run_key[:16] != keys.file_name(folder):
        return None
    move = next((move for move in moves if (move.action, move.version) == ("promoted", entry.version)), None)
    if move is None:
        return None
    facts = VersionFacts(
        **shared, run_key=entry.run_key, task=entry.task, dataset_sha256=dataset["sha256"], config_sha256="",
        adapter_sha256=findings["training"]["adapter_sha256"], parent_version=move.before, accepted=True, reasons=(),
    )  # fmt: skip
    return StoredVersion(lineage=lineage, version=entry.version, created=move.when, facts=facts)
