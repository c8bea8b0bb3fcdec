"""Move the champion of a lineage. The promotion log has the time, the person and the reason of every move.

A move is one entry of the log, written with a conditional put: of two moves at once, the log accepts one, and the other
sees that the champion has changed. So a move needs no lock.
"""

from __future__ import annotations

from deal_core.errors import RegistryError
from infra.promotions import Action, Change, Move, PromotionLog
from infra.store.base import ObjectStore
from infra.versions import ROLLOUT, Version, Versions

GATE = "gate"
"""The name in the log for a move without a person."""


def promote_accepted(store: ObjectStore, version: Version) -> None:
    """Make an accepted version the champion, or begin its rollout, unless a person must approve it first.

    The call can be repeated. A version that was promoted is not promoted again, because the lineage may have been
    rolled back since.

    Raises:
        RegistryError: Another version is champion instead of this version's parent, or a person rejected the version.
    """
    if version.approval == "refused":
        raise RegistryError(rejected_by_person(version))
    if is_overtaken(store, version):
        raise RegistryError(_overtaken(store, version))
    if not is_open(version):
        return
    if version.rollout is not None:
        begin_rollout(store, version, who=GATE, why="passed its gate", run=version.run_key)
    else:
        move_champion(
            store,
            version,
            expected=version.parent_version,
            action="promoted",
            who=GATE,
            why="passed its gate",
            run=version.run_key,
        )


def is_open(version: Version) -> bool:
    """Return whether the gate accepted the version, and its run has not yet promoted it or begun its rollout."""
    is_done = version.since.promoted is not None or version.since.rolled_out is not None
    return version.accepted and version.approval is None and not is_done


def is_overtaken(store: ObjectStore, version: Version) -> bool:
    """Return whether the promotion of a new version would lose a task.

    This is so if the champion is neither the version nor its parent.
    """
    if not is_open(version) and version.approval != "awaiting":
        return False
    champion = Versions(store).champion(version.lineage)
    return (champion.version if champion else None) not in (version.parent_version, version.version)


def move_champion(
    store: ObjectStore,
    version: Version,
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
    last = PromotionLog(store).last(version.lineage)
    champion = last.champion if last else None
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
    _add(store, last, change, is_due=champion == expected)


def begin_rollout(store: ObjectStore, version: Version, *, who: str, why: str, run: str | None = None) -> None:
    """Let a version that continues the champion be tried on live traffic. Do nothing if it is tried already.

    A rollout of another version ends: that version is left behind. `who`, `why` and `run` are those of `move_champion`.

    Raises:
        RegistryError: The champion has changed since, or the version was rejected.
    """
    assert version.rollout is not None, "the caller has looked"
    log = PromotionLog(store)
    last, opened = log.last(version.lineage), log.open_rollout(version.lineage)
    champion = last.champion if last else None
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
    _add(store, last, change, is_due=champion == version.parent_version)


def _add(store: ObjectStore, last: Move | None, change: Change, *, is_due: bool) -> None:
    """Add a change to the log after its `last` entry, if it is due and its version was not rejected."""
    log, lineage = PromotionLog(store), change.lineage
    known = Versions(store).find(lineage, change.version)  # the caller's copy may be older than the log
    if known is not None and known.approval == "refused":
        raise RegistryError(rejected_by_person(known))
    if is_due and log.add(last, change) is not None:
        return
    winner = log.last(lineage)
    by = f" by {winner.who} ({winner.why})" if winner else ""
    what = "tried on live traffic" if change.action == "rollout" else "made champion"
    raise RegistryError(
        f"Version {change.version} of '{lineage}' was not {what}: meanwhile version "
        f"{winner.champion if winner else change.before} was made champion{by}. See deal version list --lineage {lineage}, "
        "and decide again."
    )


def rejected_by_person(version: Version) -> str:
    """Return the message for a version that a person or its rollout rejected and that shall become champion."""
    by = "its rollout" if version.since.refused_by == ROLLOUT else "a person"
    return (
        f"Version {version.version} of '{version.lineage}' was rejected by {by}; learn its arrival again with: "
        f"deal version requeue {version.version} --lineage {version.lineage}"
    )


def _overtaken(store: ObjectStore, version: Version) -> str:
    champion = Versions(store).champion(version.lineage)
    origin = f"version {version.parent_version}" if version.parent_version else "the base model"
    now = f"version {champion.version} is" if champion else "no version is"
    return (
        f"Version {version.version} of {version.lineage} continues {origin}, but {now} champion now; it was not "
        "promoted. Run the same command again: it starts from the present champion."
    )
