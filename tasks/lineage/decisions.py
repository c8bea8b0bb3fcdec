"""What a person decides: which version of a lineage serves.

Decisions take effect at once, even while a run works on the lineage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Literal

from pydantic import BaseModel

from deal_core.adapter.files import WEIGHTS_FILE
from deal_core.errors import RegistryError
from infra.promotions import Action, Change, PromotionLog
from infra.store.base import ObjectStore
from infra.versions import Version, Versions, descent
from tasks.context import current_store
from tasks.lineage.history import NoVersionError, arrival_digests, find_version, unknown_lineage
from tasks.lineage.promotion import begin_rollout, move_champion, rejected_by_person
from tasks.notices import Kind, Notice, announce

Verdict = Literal["approve", "reject"]


class LeftBehind(BaseModel, frozen=True, from_attributes=True):
    """A version that the champion does not continue, and the arrival that the version learned."""

    version: str
    task: str
    dataset_sha256: str


class Decision(BaseModel, frozen=True):
    """A person's decision."""

    action: Action
    lineage: str
    version: str
    before: str | None
    """The earlier champion."""
    champion: str | None
    """The new champion."""
    left_behind: tuple[LeftBehind, ...] = ()
    """Arrivals that the earlier champion had learned and the new champion has not; `deal version requeue` learns them again."""


def decide_on(lineage: str, version: str, verdict: Verdict, *, who: str, why: str) -> Decision:
    """Approve or reject a version that waits for a person.

    Raises:
        RegistryError: The version does not wait for a person any more, or cannot become champion.
    """
    waiting = find_version(current_store(), lineage, version)
    if waiting.approval == "awaiting":
        return (promote_to if verdict == "approve" else reject_version)(lineage, version, who=who, why=why)
    now = {"given": "was approved", "refused": "was rejected"}.get(waiting.approval or "", "needs no approval")
    raise RegistryError(
        f"Version {version} of '{lineage}' does not wait for a person: it {now}. See deal version list --moves "
        f"--lineage {lineage}."
    )


def promote_to(lineage: str, version: str, *, who: str, why: str, run: str | None = None) -> Decision:
    """Make a version that continues the champion the new champion.

    A version that waited for approval, and whose gate asks for a rollout, begins the rollout instead. `run` is the key
    of its run if its rollout decided.

    Raises:
        RegistryError: The version cannot become champion.
    """
    store = current_store()
    champion, chosen = _to_promote(store, lineage, version)
    number = champion.version if champion else None
    if chosen.approval == "awaiting" and chosen.rollout is not None:
        begin_rollout(store, chosen, who=who, why=why)
        _announce("rollout", chosen, who, why)
        return Decision(action="rollout", lineage=lineage, version=version, before=number, champion=number)
    move_champion(store, chosen, expected=chosen.parent_version, action="promoted", who=who, why=why, run=run)
    _announce("promoted", chosen, who, why)
    return Decision(action="promoted", lineage=lineage, version=version, before=chosen.parent_version, champion=version)


def _to_promote(store: ObjectStore, lineage: str, version: str) -> tuple[Version | None, Version]:
    """Return the champion, and the version if it can become champion now.

    Raises:
        RegistryError: It cannot.
    """
    champion, chosen = Versions(store).champion(lineage), find_version(store, lineage, version)
    number = champion.version if champion else None
    _require_usable(store, chosen, champion)
    if number == version:
        raise RegistryError(f"Version {version} of '{lineage}' is its champion already.")
    if chosen.parent_version != number:
        origin = f"version {chosen.parent_version}" if chosen.parent_version else "the base model"
        remedy = (
            f"deal version rollback {version} --lineage {lineage}"
            if chosen.standing == "learned"
            else f"deal version requeue {version} --lineage {lineage}, which learns its arrival again on top of the champion"
        )
        raise RegistryError(
            f"Version {version} of '{lineage}' continues {origin}, but "
            f"{f'version {number}' if number else 'no version'} is champion: what was learned since would "
            f"be lost. Use {remedy}."
        )
    return champion, chosen


def roll_back(lineage: str, to: str | None, *, who: str, why: str) -> Decision:
    """Make an earlier champion, or a version that the champion continues, the champion again.

    If `to` is None, this is the champion's parent.

    Raises:
        RegistryError: There is no earlier version, or the version was never champion.
    """
    store = current_store()
    champion, chosen = _to_roll_back(store, lineage, to)
    move_champion(store, chosen, expected=champion.version, action="rolled back", who=who, why=why)
    _announce("rolled-back", chosen, who, why)
    versions = Versions(store).all(lineage)
    return Decision(
        action="rolled back",
        lineage=lineage,
        version=chosen.version,
        before=champion.version,
        champion=chosen.version,
        left_behind=left_behind(descent(versions, champion), descent(versions, chosen)),
    )


def _to_roll_back(store: ObjectStore, lineage: str, to: str | None) -> tuple[Version, Version]:
    """Return the champion, and the version to go back to.

    Raises:
        RegistryError: There is none.
    """
    champion = Versions(store).champion(lineage)
    if champion is None:
        raise RegistryError(unknown_lineage(lineage))
    to = to or champion.parent_version
    if to is None:
        raise RegistryError(
            f"Version {champion.version} of '{lineage}' continues the base model; there is no version to go back to. "
            "Name one with --to, or stop serving the lineage."
        )
    chosen = find_version(store, lineage, to)
    _require_usable(store, chosen, champion)
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
    log = PromotionLog(store)
    chosen = Versions(store).find(lineage, version)
    if chosen is None or chosen.approval == "awaiting" or log.open_rollout(lineage) is not None:
        return None
    actions: tuple[tuple[Action, Callable[[ObjectStore, str, str], object]], ...] = (
        ("promoted", _to_promote),
        ("rolled back", _to_roll_back),
    )
    for action, look in actions:
        with suppress(RegistryError):
            look(store, lineage, version)
            return action
    return None


def reject_version(lineage: str, version: str, *, who: str, why: str) -> Decision:
    """Reject a version, so that it can never become champion.

    Raises:
        RegistryError: The version is champion or was rejected already.
    """
    store = current_store()
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
        raise RegistryError(f"{name} is rejected already, {_rejection(log, lineage, version)}")
    change = Change(
        action="rejected", lineage=lineage, version=version, before=number, champion=number, who=who, why=why
    )
    if log.add(last, change) is None:
        raise RegistryError(
            f"The champion of '{lineage}' has just changed; look at deal version list --lineage {lineage}, and try again."
        )
    _announce("rejected", chosen, who, why)
    return Decision.model_validate(change, from_attributes=True)


def _rejection(log: PromotionLog, lineage: str, version: str) -> str:
    """Return the person who rejected a version, and the reason."""
    for move in reversed(log.moves(lineage)):
        if move.action == "rejected" and move.version == version:
            return f"by {move.who}: {move.why}"
    return "by a person; the promotion log does not say by whom"


def left_behind(before: Sequence[Version], now: Sequence[Version]) -> tuple[LeftBehind, ...]:
    """Return the arrivals that one line of versions has learned and another has not, oldest first."""
    known = {digest for version in now for digest in version.digests}
    return tuple(
        LeftBehind.model_validate(version)
        for version in reversed(before)
        if not arrival_digests(version, before) & known
    )


def _announce(kind: Kind, version: Version, who: str, why: str) -> None:
    announce(kind, Notice.of(version, reasons=(why,), who=who))


def _require_usable(store: ObjectStore, version: Version, champion: Version | None) -> None:
    name = f"Version {version.version} of '{version.lineage}'"
    if not version.accepted:
        raise RegistryError(f"{name} did not pass its gate: {' '.join(version.reasons)}")
    if version.approval == "refused":
        raise RegistryError(rejected_by_person(version))
    if champion and champion.base_sha256 != version.base_sha256:
        raise RegistryError(
            f"{name} adapts another base model ({version.base_sha256[:12]}) than the champion "
            f"({champion.base_sha256[:12]}); a new base model starts a new lineage."
        )
    if not store.exists(f"{version.adapter_uri}/{WEIGHTS_FILE}"):
        raise RegistryError(f"{name} has no adapter in the store any more ({store.uri_of(version.adapter_uri)}).")


def find_left_behind(lineage: str) -> tuple[LeftBehind, ...]:
    """Return the accepted versions whose arrival the champion has not learned, oldest first, each arrival once.

    An arrival is left out if another version that learned it awaits approval or is in rollout.

    Raises:
        NoVersionError: The lineage has no version.
    """
    versions = Versions(current_store()).all(lineage)
    if not versions:
        raise NoVersionError(unknown_lineage(lineage))
    learned = ("learned", "awaiting approval", "in rollout")
    known = {digest for version in versions if version.standing in learned for digest in version.digests}
    found: list[LeftBehind] = []
    for version in reversed(versions):
        if version.standing == "left behind" and not arrival_digests(version, versions) & known:
            known |= version.digests
            found.append(LeftBehind.model_validate(version))
    return tuple(reversed(found))
