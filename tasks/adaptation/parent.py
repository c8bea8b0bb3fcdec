"""The parent of a run: the lineage's champion, once what a crash left undone is done."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from deal_core.errors import RegistryError
from infra.promotions import PromotionLog
from infra.tracking.registry import open_registry
from infra.version_log import VersionLog
from tasks.adaptation.promote import champion_deleted, settle_aliases
from tasks.adaptation.resume import finish_run
from tasks.context import current_store
from tasks.lineage.stored_lineage import require_in_registry
from tasks.lineage.versions import version_ref
from tasks.references import VersionRef


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
