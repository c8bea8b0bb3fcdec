"""Health: whether what a lineage serves and learns on is there and can be read, without reading gigabytes."""

from __future__ import annotations

from deal_core.errors import DealError
from infra.promotions import PromotionLog
from infra.store.base import ObjectStore
from infra.tracking.registry import Registry, VersionInfo, require_through_gate
from tasks.adaptation.promote import champion_deleted
from tasks.lineage.record import read_record
from tasks.lineage.stored_lineage import lost_in_registry
from tasks.lineage.version_files import require_stored


def look_at_champion(store: ObjectStore, registry: Registry, lineage: str) -> tuple[VersionInfo | None, list[str]]:
    """The champion of a lineage, and what is wrong with it or with what names it.

    Looked at are the promotion log, the registry, and the champion's record, configuration and header of its weights.

    Raises:
        RegistryError: the registry cannot be read.
    """
    champion, problems = registry.champion(lineage), []
    lost = lost_in_registry(registry, store, lineage)
    if lost is not None:
        return None, [lost]
    try:
        last = PromotionLog(store).last(lineage)
        number = last.champion if last else None
        if number is not None and registry.version(lineage, number) is None:
            problems.append(champion_deleted(lineage, number))
    except DealError as error:
        problems.append(str(error))
    return champion, [*problems, *(_problems_of(store, champion) if champion else ())]


def _problems_of(store: ObjectStore, champion: VersionInfo) -> list[str]:
    problems = []
    for check in (
        lambda: require_through_gate(champion),
        lambda: read_record(store, champion.adapter_uri),
        lambda: require_stored(store, champion.adapter_uri),
    ):
        try:
            check()
        except DealError as error:
            problems.append(str(error))
    return problems
