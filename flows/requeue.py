"""Requeue: learn arrivals again that a rollback left behind, and let arrivals go on whose run was cancelled."""

from __future__ import annotations

from collections.abc import Sequence

from prefect import flow

from flows.adapt import learn
from flows.adapt_result import AdaptResult
from flows.lock import lock_lineage
from infra.store.base import ObjectStore
from infra.store.opening import open_store
from infra.versions import Version, Versions
from tasks.adaptation.resume import spec_to_relearn
from tasks.arrivals import release
from tasks.lineage.history import arrival_digests, no_version
from tasks.lineage.promotion import find_left_behind


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
    store = open_store()
    released = release(store, lineage, arrivals, checked=False) if arrivals or not versions else ()
    if released and not versions and (arrivals or not Versions(store).all(lineage)):
        return []
    async with lock_lineage(lineage):
        numbers = versions or [version.version for version in find_left_behind(store, lineage)]
        wanted = [_known_version(store, lineage, number) for number in numbers]
        # All are checked before one is learned. The lineage's base model may be another one now.
        settled = {"base_model": None} if Versions(store).champion(lineage) else {}
        specs = [spec_to_relearn(store, version)[0].model_copy(update=settled) for version in wanted]
        return [
            await learn(store, spec, again=not _is_learned(store, version), relearns=version)
            for spec, version in zip(specs, wanted, strict=True)
        ]


def _known_version(store: ObjectStore, lineage: str, number: str) -> Version:
    """Return a version by its number, also if its adapter is gone: what its run was asked may be left."""
    version = Versions(store).find(lineage, number)
    if version is None:
        raise no_version(lineage, number)
    return version


def _is_learned(store: ObjectStore, version: Version) -> bool:
    """Return whether the champion or one of its ancestors has learned the version's arrival."""
    versions = Versions(store).all(version.lineage)
    digests = arrival_digests(version, versions)
    return any(known.digests & digests for known in versions if known.standing == "learned")
