"""Where a lineage stands: its champion, what it has learned already, and what a crash left undone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from prefect import runtime, task
from prefect.cache_policies import NO_CACHE

from deal_core.errors import RegistryError
from infra.ledger import Ledger
from infra.promotions import PromotionLog
from infra.tracking.registry import VersionInfo, open_registry
from infra.version_log import VersionLog
from tasks.adaptation.promote import champion_deleted, settle_aliases
from tasks.adaptation.resume import finish_run
from tasks.context import current_store
from tasks.lineage.stored_lineage import require_in_registry
from tasks.references import BaseRef, DatasetRef, Standing, VersionRef


@task(name="parent", cache_policy=NO_CACHE)
def find_parent(lineage: str) -> VersionRef | None:
    """The champion, which the next version continues; None: the lineage starts from the base.

    What a crash left undone of the newest run that registered a version is done first, so that no accepted version is
    passed over.

    Raises:
        RegistryError: the registry has lost the versions, or the champion was deleted in MLflow. Nobody but a person
            decides what takes its place: started from the base, the lineage would lose its tasks.
    """
    registry, store = open_registry(), current_store()
    require_in_registry(registry, store, lineage)
    number, _ = settle_aliases(registry, PromotionLog(store), lineage)
    if versions := registry.versions(lineage):
        VersionLog(store).keep_missing(lineage, versions)
        newest = next(version for version in versions if version.run_key == versions[-1].run_key)  # it may be doubled
        finish_run(registry, newest, version_ref(newest))
    champion = registry.champion(lineage)
    if champion is None and number is not None:
        raise RegistryError(champion_deleted(lineage, number))
    return version_ref(champion) if champion else None


@task(name="repeat", cache_policy=NO_CACHE)
def find_repeat(dataset: DatasetRef, lineage: str) -> VersionRef | None:
    """The accepted version that has learned from this dataset, if there is one.

    Outside the champion's descent also one that has learned these rows split otherwise, by test rows that the lineage
    knew then. In it that is no repeat: the test rows were forgotten since, and the arrival brings new ones.
    """
    registry, ledger = open_registry(), Ledger(current_store())
    versions = registry.versions(lineage)
    line = descent(versions, registry.champion(lineage))
    entry = ledger.find(lineage, dataset.sha256)
    if entry is None and not any(dataset.landed_sha256 in version.digests for version in line):
        same = [version.dataset_sha256 for version in versions if dataset.landed_sha256 in version.digests]
        entry = next(filter(None, (ledger.find(lineage, sha256) for sha256 in same)), None)
    if entry is None:
        return None
    learned = [version for version in line if version.dataset_sha256 == dataset.sha256]
    known = learned[0] if learned else registry.find_version(entry.run_key)
    return version_ref(known, standing_of(known, line)) if known else None


@task(name="known-run", cache_policy=NO_CACHE)
def find_registered(run_key: str) -> VersionRef | None:
    """The version that a run of this key has registered, accepted or rejected."""
    return _with_standing(open_registry().find_version(run_key))


@task(name="own-version", cache_policy=NO_CACHE)
def find_own(dataset: DatasetRef, lineage: str) -> VersionRef | None:
    """The version that this flow run has trained on a dataset, if it was interrupted later and started again."""
    own = [
        version for version in open_registry().versions(lineage)
        if version.flow_run and version.flow_run == runtime.flow_run.id and version.dataset_sha256 == dataset.sha256
    ]  # fmt: skip
    return _with_standing(own[0] if own else None)  # of a doubled one the first counts


def _with_standing(known: VersionInfo | None) -> VersionRef | None:
    if known is None:
        return None
    registry = open_registry()
    line = descent(registry.versions(known.lineage), registry.champion(known.lineage))
    return version_ref(known, standing_of(known, line))


@task(name="attempts", cache_policy=NO_CACHE)
def count_attempts(lineage: str, dataset: DatasetRef) -> int:
    """How many versions of the lineage were trained on this dataset."""
    return sum(version.dataset_sha256 == dataset.sha256 for version in open_registry().versions(lineage))


def make_run_key(
    *, lineage: str, base: BaseRef, dataset: DatasetRef, parent: VersionRef | None, config_sha256: str, attempt: int
) -> str:
    """Identity of a run: the same arrival on the same parent with the same settings has the same key."""
    origin = parent.version if parent else "base"
    parts = [lineage, base.sha256, dataset.task, dataset.sha256, origin, config_sha256, attempt, *dataset.new_labels]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def descent(versions: Sequence[VersionInfo], version: VersionInfo | None) -> tuple[VersionInfo, ...]:
    """A version and those it continues, newest first; none without a version."""
    by_number = {each.version: each for each in versions}
    line: list[VersionInfo] = []
    while version is not None:
        line.append(version)
        version = by_number.get(version.parent_version or "")
    return tuple(line)


def arrival_digests(version: VersionInfo, versions: Sequence[VersionInfo]) -> frozenset[str]:
    """By what the arrival that a version learned is known again among `versions`.

    Not by its rows alone where the version continues one that had learned them: they landed again to bring test rows.
    """
    is_renewal = any(older.landed_sha256 == version.landed_sha256 for older in descent(versions, version)[1:])
    return version.digests - {version.landed_sha256} if is_renewal else version.digests


def standing_of(version: VersionInfo, line: Sequence[VersionInfo]) -> Standing:
    """What has become of a version, given the champion's descent."""
    if not version.accepted:
        return "rejected by the gate"
    if version.approval == "refused":
        return "rejected by a person"
    if any(each.version == version.version for each in line):
        return "learned"
    continues_champion = version.parent_version == (line[0].version if line else None)
    return "awaiting approval" if version.approval == "awaiting" and continues_champion else "left behind"


def version_ref(info: VersionInfo, standing: Standing | None = None) -> VersionRef:
    """The reference to a registered version."""
    return VersionRef(
        lineage=info.lineage,
        version=info.version,
        run_key=info.run_key,
        adapter_uri=info.adapter_uri,
        adapter_sha256=info.adapter_sha256,
        files_sha256=dict(info.files_sha256) if info.files_sha256 is not None else None,
        accepted=info.accepted,
        reasons=info.reasons,
        parent_version=info.parent_version,
        approval=info.approval,
        standing=standing,
    )
