"""The versions of a lineage, by the registry and by the store: ancestors, state, and the health of the champion."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime

from pydantic import BaseModel

from deal_core.errors import DealError, RegistryError, StoreError
from deal_core.evaluation.metrics import AccuracyMatrix
from deal_core.safe_text import listed, without_secrets
from infra.promotions import Move, PromotionLog
from infra.store import keys
from infra.store.base import ObjectStore
from infra.tracking.database import open_reader
from infra.tracking.facts import RegistryReader, VersionFacts, VersionInfo, is_being_rebuilt, require_through_gate
from infra.version_log import VersionLog
from tasks.context import current_store
from tasks.lineage.record import read_record
from tasks.lineage.version_files import borrowed_adapter
from tasks.references import Standing, VersionRef

ROLLOUT = "rollout"
"""The name in the promotion log for an end of a rollout without a person."""


class NoVersionError(RegistryError):
    """A lineage has no version, and never had one."""


class HistoryEntry(BaseModel, frozen=True):
    """One version of a lineage."""

    version: str
    task: str
    strategy: str
    parent_version: str | None
    average_accuracy: float | None
    forgetting: float | None
    backward_transfer: float | None
    forward_transfer: float | None
    arrival_accuracy: float | None
    """The champion's accuracy on the arrival's rows before anything was trained on them; None: it was not asked."""
    accepted: bool
    reasons: tuple[str, ...]
    approval: str | None
    """State of a person's approval; None: no approval is needed."""
    aliases: tuple[str, ...]
    created: datetime
    dataset_sha256: str
    adapter: str
    """Full address of its PEFT folder."""
    tracking_id: str


def read_history(lineage: str, newest: int | None = None) -> list[HistoryEntry]:
    """Return the versions of a lineage, oldest first. `newest` limits their number.

    Raises:
        NoVersionError: The lineage has no version.
        RegistryError: The registry does not answer, or has lost the lineage.
    """
    registry = open_reader()
    versions = registry.versions(lineage, newest=newest)
    if not versions:
        raise no_version(registry, lineage)
    store = current_store()
    shared = HistoryEntry.model_fields.keys() - {"adapter"}
    return [
        HistoryEntry(**{name: getattr(info, name) for name in shared}, adapter=store.uri_of(info.adapter_uri))
        for info in versions
    ]


def read_matrix(lineage: str) -> AccuracyMatrix | None:
    """Return the accuracy matrix up to the champion; None: no task of it has test rows.

    Raises:
        RegistryError: The lineage has no champion.
    """
    champion = find_version(open_reader(), lineage, None)
    return read_record(current_store(), champion.adapter_uri).matrix


def read_moves(lineage: str) -> tuple[Move, ...]:
    """Return the promotion log of a lineage, oldest entry first."""
    return PromotionLog(current_store()).moves(lineage)


def read_champion_at(lineage: str, when: datetime) -> str | None:
    """Return the number of the version that was champion at a time with a zone, or None."""
    return PromotionLog(current_store()).champion_at(lineage, when)


def find_version(registry: RegistryReader, lineage: str, version: str | None) -> VersionInfo:
    """Return a version by its number; None: the champion.

    Raises:
        RegistryError: There is no such version, or its adapter was removed.
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


def is_deleted(registry: RegistryReader, lineage: str, version: str) -> bool:
    """Whether the registry knows the lineage's champion, but not this version any more."""
    return registry.champion(lineage) is not None and registry.version(lineage, version) is None


def descent(versions: Sequence[VersionInfo], version: VersionInfo | None) -> tuple[VersionInfo, ...]:
    """Return a version and its ancestors, newest first. Without a version the result is empty."""
    by_number = {each.version: each for each in versions}
    line: list[VersionInfo] = []
    while version is not None:
        line.append(version)
        version = by_number.get(version.parent_version or "")
    return tuple(line)


def arrival_digests(version: VersionInfo, versions: Sequence[VersionInfo]) -> frozenset[str]:
    """Return the digests that identify a version's arrival among `versions`.

    If an ancestor learned the same rows, the rows landed again to bring new test rows. Then the digest of the landed
    rows identifies the ancestor's arrival too, so it is left out.
    """
    is_renewal = any(older.landed_sha256 == version.landed_sha256 for older in descent(versions, version)[1:])
    return version.digests - {version.landed_sha256} if is_renewal else version.digests


def standing_of(version: VersionInfo, line: Sequence[VersionInfo]) -> Standing:
    """Return the state of a version. `line` is the champion and its ancestors."""
    if not version.accepted:
        return "rejected by the gate"
    if version.approval == "refused":
        return "rejected by its rollout" if version.refused_by == ROLLOUT else "rejected by a person"
    if any(each.version == version.version for each in line):
        return "learned"
    if "rollout" in version.aliases:
        return "in rollout"
    continues_champion = version.parent_version == (line[0].version if line else None)
    return "awaiting approval" if version.approval == "awaiting" and continues_champion else "left behind"


def version_ref(info: VersionInfo, standing: Standing | None = None) -> VersionRef:
    """Return the reference to a registered version."""
    return ref_by_facts(info.lineage, info.version, info, standing)


def ref_by_facts(lineage: str, version: str, facts: VersionFacts, standing: Standing | None = None) -> VersionRef:
    """Return the reference to a version with these facts. The version need not be registered."""
    shared = VersionRef.model_fields.keys() - {"lineage", "version", "standing"}
    return VersionRef(
        lineage=lineage, version=version, standing=standing, **{name: getattr(facts, name) for name in shared}
    )


def no_version(registry: RegistryReader, lineage: str) -> RegistryError:
    """Return the error for a lineage of which the registry has no version: `NoVersionError`, unless they are lost."""
    lost = lost_in_registry(registry, current_store(), lineage)
    return RegistryError(lost) if lost else NoVersionError(unknown_lineage(lineage))


def unknown_lineage(lineage: str) -> str:
    """Return the message for a lineage without a champion. The message depends on the registry and the store."""
    registry = open_reader()
    if registry.versions(lineage, newest=1):
        return (
            f"Lineage '{lineage}' has versions, but none is champion. See: deal history --lineage {lineage}; then: "
            f"deal promote N --lineage {lineage} for one that was accepted, or adapt again."
        )
    store = current_store()
    known = listed(known_lineages(store))
    others = f"; this home has {known}" if known else ""
    return lost_in_registry(registry, store, lineage) or (
        f"Lineage '{lineage}' has no champion here; adapt it first (deal adapt, deal watch), "
        f"or name another home with --home or lineage with --lineage{others}."
    )


def champion_deleted(lineage: str, number: str) -> str:
    """Return the message for a champion by the promotion log that the registry no longer has."""
    return (
        f"Version {number}, champion of '{lineage}', was deleted in MLflow. Name another one: deal rollback --to N "
        f"--lineage {lineage}; deal history --lineage {lineage} shows what is left."
    )


def known_lineages(store: ObjectStore) -> tuple[str, ...]:
    """Return every lineage with an adapter, a version or a promotion in the store, in alphabetical order."""
    return tuple(
        sorted(
            {
                keys.lineage_of(info.key)
                for folder in (keys.ADAPTERS, keys.VERSIONS, keys.PROMOTIONS)
                for info in store.list(folder)
                if info.key.count("/") >= 2
            }
        )
    )


def stored_numbers(store: ObjectStore, lineage: str) -> frozenset[int]:
    """Return the numbers of all versions in the version log, the promotion log and the ledger. Skip damaged entries."""
    found = set(VersionLog(store).numbers(lineage))
    for folder in (keys.promotion_folder(lineage), keys.ledger_folder(lineage)):
        for info in store.list(folder):
            try:
                found.add(int(json.loads(store.get_bytes(info.key))["version"]))
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
    return frozenset(found)


def lost_in_registry(registry: RegistryReader, store: ObjectStore, lineage: str) -> str | None:
    """Return a message if the store has versions of a lineage and the registry has none, otherwise None."""
    if registry.versions(lineage, newest=1):
        return None
    numbers = stored_numbers(store, lineage)
    if not numbers:
        return None
    what = "1 version" if len(numbers) == 1 else f"{len(numbers)} versions"
    try:
        last = PromotionLog(store).last(lineage)
    except StoreError:
        last = None
    serves = f" and version {last.champion} as champion" if last and last.champion else ""
    return (
        f"MLflow at {without_secrets(registry.uri)} knows no version of lineage '{lineage}', while the store "
        f"{without_secrets(store.uri)} knows {what}{serves}: the database was lost, or it is the wrong one. Check "
        "MLFLOW_TRACKING_URI; if the database was lost, register the versions again with: "
        f"deal lineage rebuild {lineage}"
    )


def require_in_registry(registry: RegistryReader, store: ObjectStore, lineage: str) -> None:
    """Refuse to work on a lineage whose versions are missing in the registry.

    Raises:
        RegistryError: The registry lost the versions, or their rebuild is not complete.
    """
    problem = lost_in_registry(registry, store, lineage)
    if problem is not None:
        raise RegistryError(problem)
    if is_being_rebuilt(registry, lineage):
        raise RegistryError(
            f"The versions of lineage '{lineage}' are being registered again, or a rebuild was interrupted. If no "
            f"other process rebuilds the lineage, repeat the command: deal lineage rebuild {lineage}"
        )


def look_at_champion(
    store: ObjectStore, registry: RegistryReader, lineage: str
) -> tuple[VersionInfo | None, list[str]]:
    """Return the champion of a lineage, and the problems that keep it from serving or from being continued.

    The check reads the promotion log, the registry and the champion's record, and compares the files of its adapter and
    of its method's state with their digests.

    Raises:
        RegistryError: The registry cannot be read.
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
    def require_adapter() -> None:
        with borrowed_adapter(store, champion, with_method=True):
            pass

    problems = []
    for check in (
        lambda: require_through_gate(champion),
        lambda: read_record(store, champion.adapter_uri),
        require_adapter,
    ):
        try:
            check()
        except DealError as error:
            problems.append(str(error))
    return problems
