"""Requeue: learn arrivals again that a rollback left behind, and let arrivals go on whose run was cancelled."""

from __future__ import annotations

from collections.abc import Sequence

from prefect import flow

from deal_core.errors import ConfigError
from flows.adapt import AdaptResult, learn_arrival
from flows.lock import lock_lineage
from infra.store.base import ObjectStore
from infra.versions import Version, Versions, require_adapter
from tasks.adaptation.resume import FINDINGS_FILE, read_findings, require_same_files
from tasks.arrivals import release
from tasks.context import current_store
from tasks.lineage.history import arrival_digests, no_version
from tasks.lineage.promotion import find_left_behind
from tasks.lineage.tombstones import refuse_forgotten
from tasks.spec import AdaptSpec, parse


@flow(name="requeue", flow_run_name="requeue-{lineage}")
async def requeue(lineage: str, versions: Sequence[str] = (), arrivals: Sequence[str] = ()) -> list[AdaptResult]:
    """Learn the arrivals of versions again, and let held arrivals go on.

    Versions are learned in the given order, with the settings of their runs. An arrival that the champion has learned
    in the meantime is reported as a repeat. Without versions and without arrivals, all versions that were left behind
    are learned again, oldest first, and all arrivals go on whose run was cancelled.

    Args:
        lineage: The lineage.
        versions: Numbers of the versions.
        arrivals: Keys inbox/TASK/FILE of arrivals that are held because their run was cancelled. A watch learns them.

    Raises:
        ConfigError: A named arrival is not held.
        RegistryError: There is no such version.
        DataValidationError: An arrival's file is gone or was replaced by another.
        ForgottenRowsError: Rows of an arrival were forgotten.
    """
    store = current_store()
    released = release(store, lineage, arrivals, checked=False) if arrivals or not versions else ()
    if released and not versions and (arrivals or not Versions(store).all(lineage)):
        return []
    async with lock_lineage(lineage):
        numbers = versions or [version.version for version in find_left_behind(lineage)]
        wanted = [_known_version(store, lineage, number) for number in numbers]
        # All are checked before one is learned. The lineage's base model may be another one now.
        settled = {"base_model": None} if Versions(store).champion(lineage) else {}
        specs = [spec_to_relearn(version)[0].model_copy(update=settled) for version in wanted]
        return [
            await learn_arrival(spec, again=not _is_learned(version), requeued_sha256=version.dataset_sha256)
            for spec, version in zip(specs, wanted, strict=True)
        ]


def _known_version(store: ObjectStore, lineage: str, number: str) -> Version:
    """Return a version by its number, also if its adapter is gone: what its run was asked may be left."""
    version = Versions(store).find(lineage, number)
    if version is None:
        raise no_version(lineage, number)
    return version


def spec_to_relearn(version: Version) -> tuple[AdaptSpec, tuple[str, ...]]:
    """Return the spec of a version's run and the digests of its files, after checking that they can be learned again.

    Raises:
        DataValidationError: A file was replaced by another.
        ForgottenRowsError: Rows of the arrival were forgotten.
        RegistryError: Nothing is left of the version but its entry.
        StoreError: A file is gone.
    """
    store = current_store()
    if version.is_consolidation:
        raise ConfigError(
            f"Version {version.version} of '{version.lineage}' is a consolidation, which has no arrival of its own; "
            f"consolidate again with: deal lineage consolidate {version.lineage}"
        )
    refuse_forgotten(store, version.task, [version.dataset_sha256])
    if not store.exists(f"{version.adapter_uri}/{FINDINGS_FILE}"):
        require_adapter(version)
    spec = parse(AdaptSpec, read_findings(version.adapter_uri).spec, f"version {version.version}")
    files = require_same_files(store, spec.task, version)
    refuse_forgotten(store, version.task, files)
    return spec, files


def _is_learned(version: Version) -> bool:
    """Return whether the champion or one of its ancestors has learned the version's arrival."""
    versions = Versions(current_store()).all(version.lineage)
    digests = arrival_digests(version, versions)
    return any(known.digests & digests for known in versions if known.standing == "learned")
