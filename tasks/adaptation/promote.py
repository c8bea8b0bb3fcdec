"""Move the champion of a lineage. The promotion log has the time, the person and the reason of every move.

A move is written to the log first. Aliases and tags of the versions follow. The next reader completes an interrupted
move, before the log gets its next entry. A move needs no lock: of two moves at once, the log accepts one.
"""

from __future__ import annotations

import logging

from deal_core.errors import RegistryError
from infra.promotions import Action, Change, Move, PromotionLog
from infra.store.base import ObjectStore
from infra.tracking.facts import Alias, VersionInfo
from infra.tracking.registry import Registry, open_registry
from infra.version_log import Ledger, LedgerEntry
from tasks.context import current_store
from tasks.lineage.history import ROLLOUT
from tasks.lineage.settings import asks_for_alias_moves
from tasks.notices import Notice, announce
from tasks.references import VersionRef

logger = logging.getLogger(__name__)

GATE = "gate"
"""The name in the log for a move without a person."""


def promote_version(version: VersionRef) -> None:
    """Make an accepted version the champion, or begin its rollout, unless a person must approve it first."""
    registry = open_registry()
    known = registry.find_version(version.run_key)
    assert known is not None, "the version was registered by this run"
    complete_version(registry, known)


def is_complete(version: VersionInfo) -> bool:
    """Return whether a version's promotion is complete."""
    return not version.accepted or version.approval == "refused" or "challenger" in version.aliases


def is_overtaken(registry: Registry, version: VersionInfo) -> bool:
    """Return whether the promotion of a new version would lose a task.

    This is so if the champion is neither the version nor its parent.
    """
    is_decided = version.approval in ("given", "refused")
    if is_decided or version.promoted is not None or version.rolled_out is not None:
        return False
    champion = registry.champion(version.lineage)
    return (champion.version if champion else None) not in (version.parent_version, version.version)


def complete_version(registry: Registry, version: VersionInfo) -> None:
    """Do the last steps of an accepted version. Each step can be repeated.

    The alias `challenger` moves last and marks the end. A promoted version is not promoted again, because the lineage
    may have been rolled back since.

    Raises:
        RegistryError: Another version is champion instead of this version's parent, or a person rejected the version.
    """
    store = current_store()
    if version.approval == "refused":
        raise RegistryError(rejected_by_person(version))
    if is_overtaken(registry, version):
        raise RegistryError(_overtaken(registry, version))
    if version.approval is None and version.rollout is not None:
        if version.promoted is None and version.rolled_out is None:
            begin_rollout(registry, PromotionLog(store), version, who=GATE, why="passed its gate", run=version.run_key)
    elif version.approval is None:
        if version.promoted is None:
            move_champion(
                registry,
                PromotionLog(store),
                version,
                expected=version.parent_version,
                action="promoted",
                who=GATE,
                why="passed its gate",
                run=version.run_key,
            )
        note_learned(Ledger(store), version)
    registry.set_alias(version.lineage, "challenger", version.version)


def note_learned(ledger: Ledger, version: VersionInfo) -> None:
    """Enter the version's dataset in the ledger of learned datasets."""
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
    registry: Registry,
    log: PromotionLog,
    version: VersionInfo,
    *,
    expected: str | None,
    action: Action,
    who: str,
    why: str,
    run: str | None = None,
) -> None:
    """Make a version the champion in place of the expected champion. Do nothing if the version is champion already.

    `expected` is the number of the champion when the caller decided, or None without a champion. `run` is the key of
    the adaptation run if its gate decided.

    Raises:
        RegistryError: The champion has changed since, or a person has rejected the version.
    """
    champion, last = settle_aliases(registry, log, version.lineage)
    if champion == version.version:
        return
    change = Change(
        action=action,
        lineage=version.lineage,
        version=version.version,
        before=champion,
        champion=version.version,
        who=who,
        why=why,
        run=run,
    )
    _add(registry, log, last, change, is_due=champion == expected)


def begin_rollout(
    registry: Registry, log: PromotionLog, version: VersionInfo, *, who: str, why: str, run: str | None = None
) -> None:
    """Let a version that continues the champion be tried on live traffic. Do nothing if it is tried already.

    A rollout of another version ends: that version is left behind. `who`, `why` and `run` are those of `move_champion`.

    Raises:
        RegistryError: The champion has changed since, or the version was rejected.
    """
    assert version.rollout is not None, "the caller has looked"
    champion, last = settle_aliases(registry, log, version.lineage)
    opened = log.open_rollout(version.lineage)
    if opened is not None and opened.version == version.version:
        return
    change = Change(
        action="rollout",
        lineage=version.lineage,
        version=version.version,
        before=champion,
        champion=champion,
        who=who,
        why=why,
        run=run,
        rollout=version.rollout.kind,
    )
    _add(registry, log, last, change, is_due=champion == version.parent_version)


def _add(registry: Registry, log: PromotionLog, last: Move | None, change: Change, *, is_due: bool) -> None:
    """Add a change to the log, if it is due and its version was not rejected, and set the aliases."""
    lineage = change.lineage
    known = registry.version(lineage, change.version)  # the caller's copy may be older than the log
    if known is not None and known.approval == "refused":
        raise RegistryError(rejected_by_person(known))
    if is_due and log.add(last, change) is not None:
        settle_aliases(registry, log, lineage)
        return
    winner = log.last(lineage)
    by = f" by {winner.who} ({winner.why})" if winner else ""
    what = "tried on live traffic" if change.action == "rollout" else "made champion"
    raise RegistryError(
        f"Version {change.version} of '{lineage}' was not {what}: meanwhile version "
        f"{winner.champion if winner else change.before} was made champion{by}. See deal history --lineage {lineage}, "
        "and decide again."
    )


def settle_aliases(registry: Registry, log: PromotionLog, lineage: str) -> tuple[str | None, Move | None]:
    """Set aliases and tags by the newest move. Without a move they stay as they are.

    Every writer calls this function before it adds to the log, so earlier moves are complete. An alias that was moved
    by hand is set back, because the log is authoritative; with `alias_moves: request` the log gets a request for its
    version. The alias of a version that was deleted in MLflow is left out. The log is read again after the aliases are
    set, until no newer move is found. So the newest move wins.

    Returns:
        The champion's number and its move. The registry may no longer have this version.
    """
    move = log.last(lineage)
    champion: str | None = None
    while True:
        asked = _asked_by_hand(registry, log, move, lineage)
        requested = _request(log, move, asked) if asked and move else None
        if asked is None or requested is not None:  # otherwise the log has a newer move, which may explain the alias
            champion = _follow(registry, move, lineage)
            _follow_rollout(registry, log, lineage)
        if asked and requested:
            _announce_request(asked, requested)
        newest = log.last(lineage)
        if newest == move:
            return champion, move
        move = newest


def settled_champion(registry: Registry, store: ObjectStore, lineage: str) -> VersionInfo | None:
    """Return the champion that answers, if there is one: that of the alias, or that of the log where the lineage asks.

    A move of the alias that only asks is set back here, and announced.
    """
    champion = registry.champion(lineage)
    if champion is None or not asks_for_alias_moves(store, lineage):
        return champion
    number, _ = settle_aliases(registry, PromotionLog(store), lineage)
    return registry.version(lineage, number) if number else None


def _asked_by_hand(registry: Registry, log: PromotionLog, move: Move | None, lineage: str) -> VersionInfo | None:
    """Return the version to which somebody moved the alias in MLflow, if the lineage asks a person about such moves.

    The alias of a move that was cut short is still at `move.before`; then `previous` is not there yet.
    """
    found = registry.champion(lineage)
    if found is None or move is None or move.champion in (None, found.version):
        return None
    if found.version == move.before:
        previous = registry.with_alias(lineage, "previous")
        if previous is None or previous.version != move.before:
            return None
    if not asks_for_alias_moves(log.store, lineage) or not found.accepted or found.approval == "refused":
        return None
    return None if log.is_requested(lineage, found.version) else found


def _request(log: PromotionLog, last: Move, version: VersionInfo) -> Move | None:
    """Write the request for a version to the log; None: the log has a newer move."""
    return log.add(
        last,
        Change(
            action="requested",
            lineage=version.lineage,
            version=version.version,
            before=last.champion,
            champion=last.champion,
            who="MLflow",
            why="the alias champion was moved to it in MLflow",
        ),
    )


def _announce_request(version: VersionInfo, requested: Move) -> None:
    reason = f"{requested.why}; version {requested.champion} is champion until a person decides"
    announce("awaiting-approval", Notice.of(version, reasons=(reason,)), once=f"requested {requested.number}")


def _follow(registry: Registry, move: Move | None, lineage: str) -> str | None:
    """Set aliases and tags by a move; return the champion's number."""
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


def _follow_rollout(registry: Registry, log: PromotionLog, lineage: str) -> None:
    """Set or remove the alias of the version that is tried on live traffic."""
    opened, current = log.open_rollout(lineage), registry.with_alias(lineage, "rollout")
    wanted, found = opened.version if opened else None, current.version if current else None
    if found is not None and found != wanted:
        registry.drop_alias(lineage, "rollout")
    if wanted is not None and found != wanted:
        _set_alias(registry, lineage, "rollout", wanted)


def _set_alias(registry: Registry, lineage: str, alias: Alias, version: str) -> bool:
    """Set an alias if the version still exists; return whether it exists."""
    if registry.version(lineage, version) is None:
        logger.warning(
            "Version %s, %s of '%s' by the promotion log, was deleted in MLflow; no version has this alias.",
            version,
            alias,
            lineage,
        )
        return False
    registry.set_alias(lineage, alias, version)
    return True


def _tag(registry: Registry, move: Move) -> None:
    """Tag the version of a move, unless the version is tagged or was deleted in MLflow."""
    version = registry.version(move.lineage, move.version)
    if version is None:
        return
    is_tagged = {
        "rejected": version.approval == "refused",
        "promoted": version.promoted == str(move.number),
        "rollout": version.rolled_out == str(move.number),
    }
    if not is_tagged.get(move.action, True):
        registry.tag_version(move.lineage, move.version, tags_of(move))


def tags_of(move: Move) -> dict[str, str]:
    """Return the tags that a move gives to its version. The last tag marks that all are set."""
    if move.action == "rejected":
        return {"refused_by": move.who, "refused_why": move.why, "approval": "refused"}
    if move.action in ("promoted", "rollout"):
        given = {"approval": "given"} if move.run is None else {}
        return {**given, "promoted" if move.action == "promoted" else "rolled_out": str(move.number)}
    return {}


def rejected_by_person(version: VersionInfo) -> str:
    """Return the message for a version that a person or its rollout rejected and that shall become champion."""
    by = "its rollout" if version.refused_by == ROLLOUT else "a person"
    return (
        f"Version {version.version} of '{version.lineage}' was rejected by {by}; learn its arrival again with: "
        f"deal requeue {version.version} --lineage {version.lineage}"
    )


def _overtaken(registry: Registry, version: VersionInfo) -> str:
    champion = registry.champion(version.lineage)
    origin = f"version {version.parent_version}" if version.parent_version else "the base model"
    now = f"version {champion.version} is" if champion else "no version is"
    return (
        f"Version {version.version} of {version.lineage} continues {origin}, but {now} champion now; it was not "
        "promoted. Run the same command again: it starts from the present champion."
    )
