"""What the store knows of lineages, whatever the registry says."""

from __future__ import annotations

import json

from deal_core.errors import RegistryError, StoreError
from deal_core.masking import without_secrets
from infra.promotions import PromotionLog
from infra.store import keys
from infra.store.base import ObjectStore
from infra.tracking.rebuilding import is_being_rebuilt
from infra.tracking.registry import Registry
from infra.version_log import VersionLog


def known_lineages(store: ObjectStore) -> tuple[str, ...]:
    """Every lineage that has a version, an adapter or a champion by the store, in alphabetical order."""
    return tuple(sorted({
        keys.lineage_of(info.key)
        for folder in (keys.ADAPTERS, keys.VERSIONS, keys.PROMOTIONS)
        for info in store.list(folder) if info.key.count("/") >= 2
    }))  # fmt: skip


def stored_numbers(store: ObjectStore, lineage: str) -> frozenset[int]:
    """The numbers of all versions of which the store has heard: written, moved by the log, or entered in the ledger.

    What is damaged is passed over: this only tells that there were versions.
    """
    moved = {info.key for info in store.list(keys.promotion_folder(lineage))}
    found = {_number_in(store, key) for key in moved | {info.key for info in store.list(keys.ledger_folder(lineage))}}
    return VersionLog(store).numbers(lineage) | {number for number in found if number is not None}


def lost_in_registry(registry: Registry, store: ObjectStore, lineage: str) -> str | None:
    """What to say where the registry knows no version of a lineage and the store knows some; None: that is not so."""
    if registry.versions(lineage, newest=1):
        return None
    numbers = stored_numbers(store, lineage)
    if not numbers:
        return None
    what = "1 version" if len(numbers) == 1 else f"{len(numbers)} versions"
    champion = _champion_by_log(store, lineage)
    serves = f" and version {champion} as champion" if champion else ""
    return (
        f"MLflow at {without_secrets(registry.uri)} knows no version of lineage '{lineage}', while the store "
        f"{without_secrets(store.uri)} knows {what}{serves}: the database was lost, or it is the wrong one. Check "
        "MLFLOW_TRACKING_URI; if the database was lost, register the versions again with: "
        f"deal lineage rebuild {lineage}"
    )


def require_in_registry(registry: Registry, store: ObjectStore, lineage: str) -> None:
    """Refuse to work on a lineage whose versions the registry has lost.

    Raises:
        RegistryError: it has, or their rebuild was cut short.
    """
    problem = lost_in_registry(registry, store, lineage)
    if problem is not None:
        raise RegistryError(problem)
    if is_being_rebuilt(registry, lineage):
        raise RegistryError(
            f"The versions of lineage '{lineage}' are being registered again, or that was cut short; if no other "
            f"process is at it, give the command again: deal lineage rebuild {lineage}"
        )


def _champion_by_log(store: ObjectStore, lineage: str) -> str | None:
    try:
        last = PromotionLog(store).last(lineage)
    except StoreError:
        return None
    return last.champion if last else None


def _number_in(store: ObjectStore, key: str) -> int | None:
    try:
        return int(json.loads(store.get_bytes(key))["version"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
