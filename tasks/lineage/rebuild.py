"""Rebuild: register a lineage again from the store after the registry lost its versions.

Versions get their numbers, facts and aliases back, and new MLflow runs with scores, settings and reports. The store is
only read. An interrupted rebuild can be repeated: the registered model has a tag until the rebuild is complete.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from pydantic import BaseModel

from deal_core.base_model.sources import resolve_base
from deal_core.errors import DealError, RegistryError, StoreError
from deal_core.safe_text import without_secrets
from infra.promotions import Move, PromotionLog
from infra.settings import HomeSettings
from infra.store.base import ObjectStore, temporary_folder
from infra.tracking.facts import Alias
from infra.tracking.registry import LineageRebuild, Registry, open_registry
from infra.tracking.tracker import open_tracker
from infra.version_log import StoredVersion, VersionLog
from tasks.adaptation.promote import tags_of
from tasks.adaptation.register import log_adapter
from tasks.adaptation.resume import read_findings, report_findings
from tasks.adaptation.run import run_tags
from tasks.context import current_store
from tasks.lineage.choices import LOGGED_PARTS
from tasks.lineage.history import ref_by_facts, stored_numbers, version_ref
from tasks.lineage.record import read_record
from tasks.lineage.version_files import borrowed_adapter
from tasks.progress import advance, raise_if_stopped
from tasks.references import RunRef

logger = logging.getLogger(__name__)


class RebuildResult(BaseModel, frozen=True):
    """The versions that were registered again."""

    lineage: str
    versions: tuple[str, ...]
    left_out: tuple[str, ...]
    """Numbers that stay unused: the store has not enough facts about these versions."""
    aliases: dict[str, str]
    problems: tuple[str, ...]
    """One line for everything that could not be restored, with the reason."""


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
    log, moves = VersionLog(store), PromotionLog(store).moves(lineage)
    versions = [log.read(lineage, number) for number in sorted(log.numbers(lineage))]
    last = max(stored_numbers(store, lineage), default=0)
    if not versions:
        raise RegistryError(_nothing_known(store, lineage, last))
    _require_bases(store, versions)
    tags = tags_after(moves)
    rebuild.begin()
    report, runs, problems = advance("rebuild", len(versions)), dict[str, RunRef](), list[str]()
    for done, stored in enumerate(versions):
        raise_if_stopped()
        report(done, detail=f"version {stored.version}")
        run, model_id = _log_run(store, stored, problems)
        runs[stored.version] = run
        removed = {"adapter_removed": stored.adapter_removed} if stored.adapter_removed else {}
        more = {"created": stored.created.isoformat(), **removed, **tags.get(stored.version, {})}
        rebuild.make(stored.number, stored.facts, tracking_id=run.tracking_id, model_id=model_id, more=more)
    rebuild.leave_out(stored.number, last, stored.facts, tracking_id=run.tracking_id, model_id=model_id)
    for stored in versions:
        _end_run(registry, stored, runs[stored.version], problems)
    aliases = aliases_after(versions, moves)
    rebuild.end(aliases)
    known = {each.number for each in versions}
    return RebuildResult(
        lineage=lineage,
        versions=tuple(each.version for each in versions),
        problems=tuple(problems),
        left_out=tuple(str(number) for number in range(1, last + 1) if number not in known),
        aliases={str(alias): version for alias, version in aliases.items()},
    )


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
        stored.version
        for stored in versions
        if stored.facts.accepted and (stored.facts.approval or tags.get(stored.version))
    ]
    wanted: dict[Alias, str | None] = {
        "champion": moves[-1].champion if moves else None,
        "previous": replaced[-1] if replaced else None,
        "challenger": ended[-1] if ended else None,
    }
    there = {stored.version for stored in versions if stored.facts.accepted}
    return {alias: version for alias, version in wanted.items() if version in there and version is not None}


def _nothing_known(store: ObjectStore, lineage: str, last: int) -> str:
    where = without_secrets(store.uri)
    if not last:
        return f"The store {where} knows no version of lineage '{lineage}'; check the name and DEAL_STORE_URI."
    return (
        f"The store {where} has traces of {last} versions of lineage '{lineage}', but not enough facts to "
        "register any of them again. Restore MLflow's database from a backup, or start another lineage."
    )


def _require_bases(store: ObjectStore, versions: Iterable[StoredVersion]) -> None:
    """Find the base models before anything is changed."""
    sources = set()
    for stored in versions:
        with suppress(StoreError):  # `_log_run` reports the damage
            sources.add(read_record(store, stored.facts.adapter_uri).base.source)
    for source in sorted(sources):
        resolve_base(source, HomeSettings().cache_dir)


def _log_run(store: ObjectStore, stored: StoredVersion, problems: list[str]) -> tuple[RunRef, str]:
    """Make the MLflow run of a version with its settings and adapter. Damaged or missing parts are left out."""
    facts = stored.facts
    spec: Mapping[str, Any] = {}
    with suppress(StoreError):
        spec = read_findings(facts.adapter_uri)["spec"]
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
        if info := registry.version(stored.lineage, stored.version):
            report_findings(run, version_ref(info), findings, in_prefect=False)
    except Exception as error:  # a failed report must not stop the rebuild
        reason = without_secrets(str(error).split("\n")[0])
        logger.error("Cannot write the report of version %s again: %s", stored.version, reason)
        problems.append(f"Version {stored.version} has no report: {reason}")
    tracked.end("FINISHED")
