"""Who serves in a lineage: moves of its champion, by the gate and by people, and the arrivals that they leave behind.

A move is one entry of the promotion log, which has its time, its author and its reason. It is written with a
conditional put: of two moves at once, the log accepts one, and the other sees that the champion has changed. So a move
needs no lock, and it takes effect at once, even while a run works on the lineage.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Literal

from deal_core.adapter.files import WEIGHTS_FILE
from deal_core.errors import RegistryError
from infra.branches import Branches
from infra.outcomes import Action
from infra.promotions import Change, PromotionLog
from infra.store.base import ObjectStore
from infra.versions import Decision, Version, Versions, descent, require_adapter
from tasks.lineage.history import (
    NoVersionError,
    arrival_digests,
    find_version,
    rejected_by_person,
    unknown_lineage,
)
from tasks.lineage.tombstones import find_tombstone
from tasks.notices import Notice, announce

Verdict = Literal["approve", "reject"]


def move_champion(
    store: ObjectStore,
    version: Version,
    *,
    expected: str | None,
    action: Literal["promoted", "rolled back", "rollout"],
    who: str,
    why: str,
    run: str | None = None,
    branch: int | None = None,
) -> Change:
    """Make a version the champion, or let it be tried on live traffic; return the change. If it is so, do nothing.

    A rollout leaves the champion as it is, and ends the rollout of another version: that version is left behind.

    `expected` is the number of the champion when the caller decided, or None without a champion. `run` is the key of
    the adaptation run if its gate or its rollout decided. `branch` is the branch that the move swaps in.

    Raises:
        RegistryError: The champion has changed since, a person has rejected the version, or its adapter is being
            removed: then the champion of before is champion again.
    """
    log, lineage, own = PromotionLog(store), version.lineage, version.version
    last = log.last(lineage)
    before = last.champion if last else None
    if action == "rollout":
        assert version.rollout is not None, "the caller has looked"
        opened = log.open_rollout(lineage)
        is_done, champion, kind = opened is not None and opened.version == own, before, version.rollout.kind
    else:
        is_done, champion, kind = before == own, own, None
    change = Change(
        action=action,
        lineage=lineage,
        version=own,
        before=before,
        champion=champion,
        who=who,
        why=why,
        run=run,
        rollout=kind,
        branch=branch,
    )
    if is_done:
        return change
    present = Versions(store).find(lineage, own)  # the caller's copy may be older than the log
    if present is not None and present.approval == "refused":
        raise RegistryError(rejected_by_person(present))
    if before == expected and (move := log.add(last, change)) is not None:
        removed = Versions(store).find(lineage, own)
        if action != "rollout" and removed is not None and removed.since.adapter_removed:  # a deletion was faster
            back: Action = "stopped" if before is None else "rolled back"
            why = "its adapter was removed just now"
            undone = Change(
                action=back, lineage=lineage, version=before or own, before=own, champion=before, who=who, why=why
            )
            log.add(move, undone)
            require_adapter(removed)
        return change
    winner = log.last(lineage)
    by = f" by {winner.who} ({winner.why})" if winner else ""
    what = "tried on live traffic" if action == "rollout" else "made champion"
    raise RegistryError(
        f"Version {own} of '{lineage}' was not {what}: meanwhile version {winner.champion if winner else before} was "
        f"made champion{by}. See deal version list --lineage {lineage}, and decide again."
    )


def decide_on(store: ObjectStore, lineage: str, version: str, verdict: Verdict, *, who: str, why: str) -> Decision:
    """Approve or reject a version that waits for a person.

    Raises:
        RegistryError: The version does not wait for a person any more, or cannot become champion.
    """
    waiting = find_version(store, lineage, version)
    if waiting.approval == "awaiting":
        return (promote_to if verdict == "approve" else reject_version)(store, lineage, version, who=who, why=why)
    now = {"given": "was approved", "refused": "was rejected"}.get(waiting.approval or "", "needs no approval")
    raise RegistryError(
        f"Version {version} of '{lineage}' does not wait for a person: it {now}. See deal version list --moves "
        f"--lineage {lineage}."
    )


def promote_to(
    store: ObjectStore, lineage: str, version: str, *, who: str, why: str, run: str | None = None
) -> Decision:
    """Make a version that continues the champion the new champion.

    A version that waited for approval, and whose gate asks for a rollout, begins the rollout instead. `run` is the key
    of its run if its rollout decided.

    Raises:
        RegistryError: The version cannot become champion.
    """
    chosen = _to_promote(store, lineage, version)
    change = move_champion(
        store,
        chosen,
        expected=chosen.parent_version,
        action="rollout" if chosen.approval == "awaiting" and chosen.rollout is not None else "promoted",
        who=who,
        why=why,
        run=run,
    )
    return Decision.model_validate(change, from_attributes=True)


def _to_promote(store: ObjectStore, lineage: str, version: str) -> Version:
    """Return the version; raise RegistryError if it cannot become champion now."""
    champion, chosen = Versions(store).champion(lineage), find_version(store, lineage, version)
    number = champion.version if champion else None
    _require_usable(store, chosen)
    if champion is None and (branch := Branches(store).open(lineage)) is not None:  # it has stopped the champion
        raise RegistryError(f"No version of '{lineage}' can be promoted now: {branch.why_waiting}")
    if number == version:
        raise RegistryError(f"Version {version} of '{lineage}' is its champion already.")
    if chosen.standing == "remade":
        raise RegistryError(
            f"Version {version} of '{lineage}' was made again by a branch, and becomes champion only with the whole "
            f"branch. See: deal lineage branch {lineage}"
        )
    if chosen.parent_version != number:
        remedy = (
            f"deal version rollback {version} --lineage {lineage}"
            if chosen.standing == "learned"
            else f"deal version requeue {version} --lineage {lineage}, which learns its arrival again on the champion"
        )
        raise RegistryError(
            f"Version {version} of '{lineage}' continues {chosen.parent}, but "
            f"{f'version {number}' if number else 'no version'} is champion: what was learned since would "
            f"be lost. Use {remedy}."
        )
    return chosen


def roll_back(store: ObjectStore, lineage: str, to: str | None, *, who: str, why: str) -> Decision:
    """Make an earlier champion, or a version that the champion continues, the champion again; None: its parent.

    Raises:
        RegistryError: There is no earlier version, or the version was never champion.
    """
    champion, chosen = _to_roll_back(store, lineage, to)
    change = move_champion(store, chosen, expected=champion.version, action="rolled back", who=who, why=why)
    versions = Versions(store).all(lineage)
    left = left_behind(descent(versions, champion), descent(versions, chosen))
    return Decision(**change.model_dump(), left_behind=left)


def _to_roll_back(store: ObjectStore, lineage: str, to: str | None) -> tuple[Version, Version]:
    """Return the champion, and the version to go back to; raise RegistryError if there is none."""
    champion = Versions(store).champion(lineage)
    if champion is None:
        raise RegistryError(unknown_lineage(store, lineage))
    to = to or champion.parent_version
    if to is None:
        raise RegistryError(
            f"Version {champion.version} of '{lineage}' continues the base model; there is no version to go back to. "
            f"Name one: deal version rollback N --lineage {lineage}; or stop serving the lineage."
        )
    chosen = find_version(store, lineage, to)
    _require_usable(store, chosen)
    served = {move.champion for move in PromotionLog(store).moves(lineage)}
    if to == champion.version or not (chosen.standing == "learned" or to in served):
        remedy = f"promote it with deal version promote {to} --lineage {lineage}"
        what = "is champion now" if to == champion.version else f"was never champion; {remedy}"
        raise RegistryError(f"Version {to} of '{lineage}' {what}; see: deal version list --lineage {lineage}")
    return champion, chosen


def promoted_by_hand(store: ObjectStore, lineage: str, version: str) -> Action | None:
    """Return what a move of the champion to a version would be, promotion or rollback; None: it may not be made.

    A person has moved the alias in MLflow. Such a move never replaces an approval or ends a rollout.
    """
    chosen = Versions(store).find(lineage, version)
    if chosen is None or chosen.approval == "awaiting" or PromotionLog(store).open_rollout(lineage) is not None:
        return None
    with suppress(RegistryError):
        _to_promote(store, lineage, version)
        return "promoted"
    with suppress(RegistryError):
        _to_roll_back(store, lineage, version)
        return "rolled back"
    return None


def reject_version(store: ObjectStore, lineage: str, version: str, *, who: str, why: str) -> Decision:
    """Reject a version, so that it can never become champion.

    Raises:
        RegistryError: The version is champion, was rejected already, or is one of an open branch.
    """
    log = PromotionLog(store)
    last = log.last(lineage)
    number = last.champion if last else None
    chosen = find_version(store, lineage, version)
    name = f"Version {version} of '{lineage}'"
    if number == version:
        raise RegistryError(f"{name} is its champion; go back first: deal version rollback --lineage {lineage}")
    if not chosen.accepted:
        raise RegistryError(f"{name} is rejected already, by its gate: {' '.join(chosen.reasons)}")
    if chosen.approval == "refused":
        move = [move for move in log.moves(lineage) if (move.action, move.version) == ("rejected", version)][-1]
        raise RegistryError(f"{name} is rejected already, by {move.who}: {move.why}")
    branch = Branches(store).open(lineage)
    if branch is not None and chosen.branch == branch.number:
        raise RegistryError(f"{name} is one of a branch that is not ended: {branch.why_waiting}", code="branch-open")
    change = Change(
        action="rejected", lineage=lineage, version=version, before=number, champion=number, who=who, why=why
    )
    if log.add(last, change) is None:
        raise RegistryError(
            f"The champion of '{lineage}' has just changed. See: deal version list --lineage {lineage}; then try again."
        )
    return Decision.model_validate(change, from_attributes=True)


def announce_decision(store: ObjectStore, done: Decision, *, to_server: bool = True) -> tuple[str, ...]:
    """Announce a move or a rejection that the promotion log has; return who was not told. For errors see `announce`."""
    version = find_version(store, done.lineage, done.version)
    notice = Notice.of(version, reasons=(done.why,), who=done.who)
    return announce(done.action, notice, to_server=to_server)


def left_behind(before: Sequence[Version], now: Sequence[Version]) -> tuple[Version, ...]:
    """Return the versions of one line whose arrivals another line has not learned, oldest first."""
    learned = {digest for version in now for digest in version.digests}
    return tuple(
        version
        for version in reversed(before)
        if not version.is_consolidation and not arrival_digests(version, before) & learned
    )


def _require_usable(store: ObjectStore, version: Version) -> None:
    name = f"Version {version.version} of '{version.lineage}'"
    if not version.accepted:
        raise RegistryError(f"{name} did not pass its gate: {' '.join(version.reasons)}")
    if version.approval == "refused":
        raise RegistryError(rejected_by_person(version))
    if not store.exists(f"{version.adapter_uri}/{WEIGHTS_FILE}"):
        raise RegistryError(f"{name} has no adapter in the store any more ({store.uri_of(version.adapter_uri)}).")


def find_left_behind(store: ObjectStore, lineage: str) -> tuple[Version, ...]:
    """Return the accepted versions whose arrival the champion has not learned, oldest first, each arrival once.

    An arrival is left out if another version that learned it awaits approval or is in rollout, or if its rows were
    deleted. A version whose adapter is gone counts too: its spec and its dataset are enough to learn the arrival again.

    Raises:
        NoVersionError: The lineage has no version.
    """
    versions = Versions(store).all(lineage)
    if not versions:
        raise NoVersionError(unknown_lineage(store, lineage))
    standings = ("learned", "awaiting approval", "rollout")
    learned = {digest for version in versions if version.standing in standings for digest in version.digests}
    newest_first: list[Version] = []
    for version in reversed(versions):
        if version.is_consolidation or version.standing != "left behind":
            continue  # the arrivals of a consolidation are those of the versions before it
        if not arrival_digests(version, versions) & learned:
            learned |= version.digests
            if find_tombstone(store, version.task, sorted(version.digests)) is not None:
                continue
            newest_first.append(version)
    return tuple(reversed(newest_first))
