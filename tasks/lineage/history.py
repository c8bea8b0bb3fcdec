"""The history of a lineage, as the registry tells it."""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel, ConfigDict

from deal_core.errors import RegistryError
from infra.promotions import Move, PromotionLog
from infra.tracking.registry import Registry, VersionInfo, open_registry
from tasks.context import current_store
from tasks.lineage.stored_lineage import lost_in_registry


class HistoryEntry(BaseModel):
    """One version of a lineage."""

    model_config = ConfigDict(frozen=True)

    version: str
    task: str
    strategy: str
    parent_version: str | None
    average_accuracy: float | None
    forgetting: float | None
    backward_transfer: float | None
    forward_transfer: float | None
    accepted: bool
    reasons: tuple[str, ...]
    approval: str | None
    """What a person said, or that one is waited for; None: nobody was asked."""
    aliases: tuple[str, ...]
    created: datetime
    dataset_sha256: str
    adapter: str
    """Full address of its PEFT folder."""
    tracking_id: str


def read_history(lineage: str, newest: int | None = None) -> list[HistoryEntry]:
    """The versions of a lineage, all or so many of the newest ones, oldest first.

    Raises:
        RegistryError: the lineage has no version.
    """
    versions = open_registry().versions(lineage, newest=newest)
    if not versions:
        raise RegistryError(unknown_lineage(lineage))
    store = current_store()
    shared = HistoryEntry.model_fields.keys() - {"adapter"}
    return [
        HistoryEntry(**{name: getattr(info, name) for name in shared}, adapter=store.uri_of(info.adapter_uri))
        for info in versions
    ]


def read_moves(lineage: str) -> tuple[Move, ...]:
    """The promotion log of a lineage, oldest first."""
    return PromotionLog(current_store()).moves(lineage)


def read_champion_at(lineage: str, when: datetime) -> str | None:
    """Number of the version that was champion at a time (local, unless it says otherwise); None: none was."""
    return PromotionLog(current_store()).champion_at(lineage, when.astimezone())


def find_version(registry: Registry, lineage: str, version: str | None) -> VersionInfo:
    """A version by its number; None: the champion.

    Raises:
        RegistryError: there is none.
    """
    if version is None:
        champion = registry.champion(lineage)
        if champion is None:
            raise RegistryError(unknown_lineage(lineage))
        return champion
    found = next((info for info in registry.versions(lineage) if info.version == version), None)
    if found is None:
        raise RegistryError(
            lost_in_registry(registry, current_store(), lineage)
            or f"Lineage '{lineage}' has no version {version}; see: deal history --lineage {lineage}"
        )
    if found.adapter_removed:
        raise RegistryError(
            f"The adapter of version {version} of '{lineage}' was removed on {found.adapter_removed} (deal gc); its "
            "history is left. Name another version."
        )
    return found


def unknown_lineage(lineage: str) -> str:
    """What to say where a lineage has no champion: whether the registry has versions of it, or the store alone."""
    registry = open_registry()
    if registry.versions(lineage, newest=1):
        return (
            f"Lineage '{lineage}' has versions, but none is champion. See: deal history --lineage {lineage}; then: "
            f"deal promote N --lineage {lineage} for one that was accepted, or adapt again."
        )
    return lost_in_registry(registry, current_store(), lineage) or (
        f"Lineage '{lineage}' has no champion here; adapt it first (deal adapt, deal watch), "
        "or name another home with --home or lineage with --lineage."
    )
