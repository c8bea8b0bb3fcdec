"""Promote: the champion of a lineage moves, and the promotion log tells when, by whom and why.

The log is written first; aliases and the versions' tags follow it, so that a move that was cut short is completed by
whoever looks next, and before the log's next entry. Nobody has to hold the lineage for it: of two moves at once, the
log lets one win.
"""

from __future__ import annotations

import logging

from prefect import task
from prefect.cache_policies import NO_CACHE

from deal_core.errors import RegistryError
from infra.promotions import Action, Change, Ledger, LedgerEntry, Move, PromotionLog
from infra.tracking.registry import Alias, Registry, VersionInfo, open_registry
from tasks.context import current_store
from tasks.references import VersionRef

logger = logging.getLogger(__name__)

GATE = "gate"
"""Who moves the champion where nobody has to be asked."""


@task(name="promote", cache_policy=NO_CACHE)
def promote_version(version: VersionRef) -> None:
    """Make an accepted version the champion, unless a person has to agree first."""
    registry = open_registry()
    known = registry.find_version(version.run_key)
    assert known is not None, "the version was registered by this run"
    complete_version(registry, known)


def is_complete(version: VersionInfo) -> bool:
    """Whether nothing of a version's promotion is left to do."""
    return not version.accepted or version.approval == "refused" or "challenger" in version.aliases


def is_overtaken(registry: Registry, version: VersionInfo) -> bool:
    """Whether a version that its run has yet to promote would lose a task.

    So it does where the champion is neither the version nor what it continues.
    """
    if version.approval is not None or version.promoted is not None:
        return False
    champion = registry.champion(version.lineage)
    return (champion.version if champion else None) not in (version.parent_version, version.version)


def complete_version(registry: Registry, version: VersionInfo) -> None:
    """The last steps of an accepted version; each can be repeated, and `challenger` moves last, as the sign of the end.

    A version that was promoted is not promoted again: since then somebody may have gone back to another.

    Raises:
        RegistryError: another version took the place of the one that this version continues, or a person rejected it.
    """
    store = current_store()
    if version.approval == "refused":
        raise RegistryError(rejected_by_person(version))
    if is_overtaken(registry, version):
        raise RegistryError(_overtaken(registry, version))
    if version.approval is None:
        if version.promoted is None:
            move_champion(
                registry, PromotionLog(store), version, expected=version.parent_version, action="promoted", who=GATE,
                why="passed its gate", run=version.run_key,
            )  # fmt: skip
        note_learned(Ledger(store), version)
    registry.set_alias(version.lineage, "challenger", version.version)


def note_learned(ledger: Ledger, version: VersionInfo) -> None:
    """Enter that the lineage has learned from the version's dataset."""
    ledger.record(
        LedgerEntry(
            lineage=version.lineage,
            sha256=version.dataset_sha256,
            task=version.task,
            run_key=version.run_key,
            version=version.version,
        )
    )


def move_champion(
    registry: Registry, log: PromotionLog, version: VersionInfo, *, expected: str | None, action: Action, who: str,
    why: str, run: str | None = None,
) -> None:
    """Make a version the champion in place of the one that the caller has seen; nothing if it is champion already.

    Args:
        registry: carries the aliases.
        log: takes the move.
        version: the champion to be.
        expected: number of the champion that the caller decided upon; None: there was none.
        action: what kind of move it is.
        who: who decided.
        why: for what reason.
        run: key of the adaptation run, where one decided.

    Raises:
        RegistryError: the champion is another by now, or a person has rejected the version.
    """
    lineage = version.lineage
    champion, last = settle_aliases(registry, log, lineage)
    if champion == version.version:
        return
    known = registry.version(lineage, version.version)  # as the log has it: the caller may have read it earlier
    if known is not None and known.approval == "refused":
        raise RegistryError(rejected_by_person(version))
    if champion == expected:
        change = Change(
            action=action, lineage=lineage, version=version.version, before=champion, champion=version.version,
            who=who, why=why, run=run,
        )  # fmt: skip
        added = log.add(last, change)
        if added is not None:
            settle_aliases(registry, log, lineage)
            return
    winner = log.last(lineage)
    by = f" by {winner.who} ({winner.why})" if winner else ""
    raise RegistryError(
        f"Version {version.version} of '{lineage}' was not made champion: meanwhile version "
        f"{winner.champion if winner else champion} was{by}. Look at deal history --lineage {lineage}, and decide anew."
    )


def settle_aliases(registry: Registry, log: PromotionLog, lineage: str) -> tuple[str | None, Move | None]:
    """Set aliases and tags as the newest move says; without a move they stand as they are.

    Whoever adds to the log has called this before, so that of earlier moves nothing is left to do. An alias that was
    moved by hand is set back: the log is what later decisions rest on. The alias of a version that was deleted in
    MLflow is left out. The log is read again after each setting: whoever has set what is no longer the newest mends it,
    so that the newest move wins in the end.

    Returns:
        The champion's number, and the move that says so. The registry need not have that version any more.
    """
    move = log.last(lineage)
    while True:
        champion = _follow(registry, move, lineage)
        newest = log.last(lineage)
        if newest == move:
            return champion, move
        move = newest


def _follow(registry: Registry, move: Move | None, lineage: str) -> str | None:
    """Set aliases and tags as a move says, and return the champion's number."""
    champion = registry.champion(lineage)
    current = champion.version if champion else None
    if move is not None:
        _tag(registry, move)
    if move is None or move.champion is None:
        return current
    if current != move.champion and _set_alias(registry, lineage, "champion", move.champion) and current != move.before:
        logger.warning("%s@champion was version %s; the promotion log says %s.", lineage, current, move.champion)
    if move.before is not None and move.before != move.champion:
        previous = registry.with_alias(lineage, "previous")
        if previous is None or previous.version != move.before:
            _set_alias(registry, lineage, "previous", move.before)
    return move.champion


def _set_alias(registry: Registry, lineage: str, alias: Alias, version: str) -> bool:
    """Set an alias to a version, if the version is still there; return whether it is."""
    if registry.version(lineage, version) is None:
        logger.warning(
            "Version %s, %s of '%s' by the promotion log, was deleted in MLflow; nothing carries that alias.",
            version, alias, lineage,
        )  # fmt: skip
        return False
    registry.set_alias(lineage, alias, version)
    return True


def champion_deleted(lineage: str, number: str) -> str:
    """What to say where the version that the promotion log has as champion is gone from the registry."""
    return (
        f"Version {number}, champion of '{lineage}', was deleted in MLflow. Name another one: deal rollback --to N "
        f"--lineage {lineage}; deal history --lineage {lineage} shows what is left."
    )


def _tag(registry: Registry, move: Move) -> None:
    """Tag the version that a move is about; nothing if it is tagged, or was deleted in MLflow by hand."""
    version = registry.version(move.lineage, move.version)
    if version is None:
        return
    if move.action == "rejected" and version.approval != "refused":
        tags = {"refused_by": move.who, "refused_why": move.why, "approval": "refused"}
        registry.tag_version(move.lineage, move.version, tags)
    if move.action == "promoted" and version.promoted != str(move.number):
        given = {"approval": "given"} if move.run is None else {}
        registry.tag_version(move.lineage, move.version, {**given, "promoted": str(move.number)})


def rejected_by_person(version: VersionInfo) -> str:
    """What to say where a version that a person rejected would become champion."""
    return (
        f"Version {version.version} of '{version.lineage}' was rejected by a person; learn its arrival again with: "
        f"deal requeue {version.version} --lineage {version.lineage}"
    )


def _overtaken(registry: Registry, version: VersionInfo) -> str:
    champion = registry.champion(version.lineage)
    origin = f"version {version.parent_version}" if version.parent_version else "the base model"
    now = f"version {champion.version} is" if champion else "no version is"
    return (
        f"Version {version.version} of {version.lineage} continues {origin}, but {now} champion now; it was not "
        "promoted. Run the same command again: it starts from the champion of now."
    )
