"""Requeue: arrivals that a rollback left behind are learned again, on top of the champion of now."""

from __future__ import annotations

from collections.abc import Sequence

from prefect import flow

from deal_core.errors import RegistryError
from flows.adapt import arrival_of, learn_arrival
from flows.lock import hold_lineage
from flows.promote import Learned
from flows.results import AdaptResult
from infra.tracking.registry import Registry, VersionInfo, open_registry
from infra.version_log import VersionLog
from tasks.adaptation.begin import arrival_digests, descent, standing_of
from tasks.adaptation.resume import read_spec_of, require_same_files
from tasks.context import current_store
from tasks.lineage.history import find_version, unknown_lineage
from tasks.lineage.tombstones import refuse_forgotten
from tasks.spec import AdaptSpec, parse


def find_left_behind(lineage: str) -> tuple[Learned, ...]:
    """Accepted versions whose arrival the champion has not learned, oldest first, each arrival once.

    Not those of which another version awaits approval.

    Raises:
        RegistryError: the lineage has no version.
    """
    registry = open_registry()
    versions = registry.versions(lineage)
    if not versions:
        raise RegistryError(unknown_lineage(lineage))
    line = descent(versions, registry.champion(lineage))
    standings = {version.version: standing_of(version, line) for version in versions}
    waiting = [version for version in versions if standings[version.version] == "awaiting approval"]
    known = {digest for version in (*line, *waiting) for digest in version.digests}
    found: list[Learned] = []
    for version in reversed(versions):
        if standings[version.version] == "left behind" and not arrival_digests(version, versions) & known:
            known |= version.digests
            found.append(Learned(version=version.version, task=version.task, dataset_sha256=version.dataset_sha256))
    return tuple(reversed(found))


@flow(name="requeue", flow_run_name="requeue-{lineage}")
async def requeue(lineage: str, versions: Sequence[str] = ()) -> list[AdaptResult]:
    """Learn the arrivals of versions again, with the settings of their runs, in the order given.

    What the champion has learned by the time it is their turn is reported as a repeat.

    Args:
        lineage: whose versions.
        versions: their numbers; none: all that were left behind, oldest first.

    Raises:
        RegistryError: there is no such version.
        DataValidationError: an arrival's file is gone, or another lies in its place.
        ForgottenRowsError: the rows of one were forgotten.
    """
    registry = open_registry()
    async with hold_lineage(lineage):
        numbers = versions or [each.version for each in find_left_behind(lineage)]
        found = [find_version(registry, lineage, number) for number in numbers]
        specs = [_spec_of(version) for version in found]
        return [await _learn(registry, spec, version) for spec, version in zip(specs, found, strict=True)]


async def _learn(registry: Registry, spec: AdaptSpec, version: VersionInfo) -> AdaptResult:
    run = await learn_arrival(spec, again=not _is_learned(registry, version))
    if run.version and run.status != "repeat":  # its dataset may be another one: of labels that the task has gained
        registry.tag_version(version.lineage, run.version, {"requeued_sha256": version.dataset_sha256})
        tagged = registry.version(version.lineage, run.version)
        if tagged is not None:
            VersionLog(current_store()).keep(tagged)
    return run


def _spec_of(version: VersionInfo) -> AdaptSpec:
    """What the run of a version was asked, once it is known that the same can be learned again."""
    store = current_store()
    refuse_forgotten(store, version.task, [version.dataset_sha256])
    spec = parse(AdaptSpec, dict(read_spec_of(version.adapter_uri)), f"version {version.version}")
    refuse_forgotten(store, version.task, require_same_files(store, arrival_of(spec), version))
    return spec


def _is_learned(registry: Registry, version: VersionInfo) -> bool:
    versions = registry.versions(version.lineage)
    wanted = arrival_digests(version, versions)
    return any(each.digests & wanted for each in descent(versions, registry.champion(version.lineage)))
