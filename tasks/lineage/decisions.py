"""What a person decides: which version of a lineage serves.

Decisions take effect at once, even while a run works on the lineage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel

from deal_core.adapter.files import WEIGHTS_FILE
from deal_core.errors import RegistryError
from infra.promotions import Action, Change, Move, PromotionLog
from infra.tracking.facts import VersionInfo
from infra.tracking.registry import Registry, open_registry
from infra.version_log import Ledger
from tasks.adaptation.promote import begin_rollout, move_champion, note_learned, rejected_by_person, settle_aliases
from tasks.context import current_store
from tasks.lineage.history import (
    arrival_digests,
    champion_deleted,
    descent,
    find_version,
    is_deleted,
    no_version,
    require_in_registry,
    standing_of,
    unknown_lineage,
)
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
    """Arrivals that the earlier champion had learned and the new champion has not; `deal requeue` learns them again."""


def decide_on(lineage: str, version: str, verdict: Verdict, *, who: str, why: str) -> Decision:
    """Approve or reject a version that waits for a person.

    `reject` of a version that was asked for by a move of the alias only ends the request.

    Raises:
        RegistryError: The version does not wait for a person any more, or cannot become champion.
    """
    registry, log, number, last, _ = _look(lineage)
    found = find_version(registry, lineage, version)
    if found.approval == "awaiting":
        return (promote_to if verdict == "approve" else reject_version)(lineage, version, who=who, why=why)
    if not log.is_requested(lineage, version):
        now = {"given": "was approved", "refused": "was rejected"}.get(found.approval or "", "needs no approval")
        raise RegistryError(
            f"Version {version} of '{lineage}' does not wait for a person: it {now}. See deal history --moves "
            f"--lineage {lineage}."
        )
    if verdict == "reject":
        return _write(
            log,
            last,
            Change(
                action="declined", lineage=lineage, version=version, before=number, champion=number, who=who, why=why
            ),
        )
    act = promote_to if found.parent_version == number else roll_back
    return act(lineage, version, who=who, why=why)


def _write(log: PromotionLog, last: Move | None, change: Change) -> Decision:
    """Write a decision that does not move the champion. `last` is the move that made the champion known here.

    Raises:
        RegistryError: The log has a newer move.
    """
    if log.add(last, change) is None:
        raise RegistryError(
            f"The champion of '{change.lineage}' has just changed; look at deal history --lineage {change.lineage}, "
            "and try again."
        )
    return Decision.model_validate(change, from_attributes=True)


def promote_to(lineage: str, version: str, *, who: str, why: str, run: str | None = None) -> Decision:
    """Make a version that continues the champion the new champion.

    A version that waited for approval, and whose gate asks for a rollout, begins the rollout instead. `run` is the key
    of its run if its rollout decided.

    Raises:
        RegistryError: The version cannot become champion.
    """
    registry, log, number, _, champion = _look(lineage)
    found = find_version(registry, lineage, version)
    _require_usable(found, champion)
    if number == version:
        raise RegistryError(f"Version {version} of '{lineage}' is its champion already.")
    if found.parent_version != number:
        if champion is None and number is not None:
            raise RegistryError(champion_deleted(lineage, number))
        line = descent(registry.versions(lineage), champion)
        origin = f"version {found.parent_version}" if found.parent_version else "the base model"
        remedy = (
            f"deal rollback --to {version} --lineage {lineage}"
            if any(each.version == version for each in line)
            else f"deal requeue {version} --lineage {lineage}, which learns its arrival again on top of the champion"
        )
        raise RegistryError(
            f"Version {version} of '{lineage}' continues {origin}, but "
            f"{f'version {number}' if number else 'no version'} is champion: what was learned since would "
            f"be lost. Use {remedy}."
        )
    if found.approval == "awaiting" and found.rollout is not None:
        begin_rollout(registry, log, found, who=who, why=why)
        _announce("rollout", found, who, why)
        return Decision(action="rollout", lineage=lineage, version=version, before=number, champion=number)
    note_learned(Ledger(log.store), found)  # before the move: if this process dies here, the arrival is known
    move_champion(registry, log, found, expected=found.parent_version, action="promoted", who=who, why=why, run=run)
    _announce("promoted", found, who, why)
    return Decision(action="promoted", lineage=lineage, version=version, before=found.parent_version, champion=version)


def roll_back(lineage: str, to: str | None, *, who: str, why: str) -> Decision:
    """Make an earlier champion, or a version that the champion continues, the champion again.

    If `to` is None, this is the champion's parent. A champion that was deleted in MLflow can be replaced too, but then
    the decision names no arrivals as left behind.

    Raises:
        RegistryError: There is no earlier version, or the version was never champion.
    """
    registry, log, number, _, champion = _look(lineage)
    if number is None:
        raise RegistryError(unknown_lineage(lineage))
    if champion is None and to is None:
        raise RegistryError(champion_deleted(lineage, number))
    to = to or (champion.parent_version if champion else None)
    if to is None:
        raise RegistryError(
            f"Version {number} of '{lineage}' continues the base model; there is no version to go back to. "
            "Name one with --to, or stop serving the lineage."
        )
    found = find_version(registry, lineage, to)
    _require_usable(found, champion)
    versions = registry.versions(lineage)
    line = descent(versions, champion)
    served = {each.version for each in line} | {move.champion for move in log.moves(lineage)}
    if to == number or to not in served:
        remedy = f"promote it with deal promote {to} --lineage {lineage}"
        what = "is champion now" if to == number else f"was never champion; {remedy}"
        raise RegistryError(f"Version {to} of '{lineage}' {what}; see: deal history --lineage {lineage}")
    move_champion(registry, log, found, expected=number, action="rolled back", who=who, why=why)
    _announce("rolled-back", found, who, why)
    return Decision(
        action="rolled back",
        lineage=lineage,
        version=to,
        before=number,
        champion=to,
        left_behind=left_behind(line, descent(versions, found)),
    )


def reject_version(lineage: str, version: str, *, who: str, why: str) -> Decision:
    """Reject a version, so that it can never become champion.

    Raises:
        RegistryError: The version is champion or was rejected already.
    """
    registry, log = open_registry(), PromotionLog(current_store())
    number, last = settle_aliases(registry, log, lineage)
    change = Change(
        action="rejected", lineage=lineage, version=version, before=number, champion=number, who=who, why=why
    )
    try:
        found = find_version(registry, lineage, version)
    except RegistryError:
        tried = log.open_rollout(lineage)
        if tried is None or tried.version != version or not is_deleted(registry, lineage, version):
            raise
        return _write(log, last, change)  # ends the rollout of a version that somebody deleted in MLflow
    name = f"Version {version} of '{lineage}'"
    if number == version:
        raise RegistryError(f"{name} is its champion; go back first: deal rollback --lineage {lineage}")
    if not found.accepted:
        raise RegistryError(f"{name} is rejected already, by its gate: {' '.join(found.reasons)}")
    if found.approval == "refused":
        raise RegistryError(f"{name} is rejected already, {_rejection(log, lineage, version)}")
    done = _write(log, last, change)
    settle_aliases(registry, log, lineage)
    _announce("rejected", found, who, why)
    return done


def _rejection(log: PromotionLog, lineage: str, version: str) -> str:
    """Return the person who rejected a version, and the reason."""
    for move in reversed(log.moves(lineage)):
        if move.action == "rejected" and move.version == version:
            return f"by {move.who}: {move.why}"
    return "by a person; the promotion log does not say by whom"


def left_behind(before: Sequence[VersionInfo], now: Sequence[VersionInfo]) -> tuple[LeftBehind, ...]:
    """Return the arrivals that one line of versions has learned and another has not, oldest first."""
    known = {digest for version in now for digest in version.digests}
    return tuple(
        LeftBehind.model_validate(version)
        for version in reversed(before)
        if not arrival_digests(version, before) & known
    )


def _announce(kind: Kind, version: VersionInfo, who: str, why: str) -> None:
    announce(kind, Notice.of(version, reasons=(why,), who=who))


def _look(lineage: str) -> tuple[Registry, PromotionLog, str | None, Move | None, VersionInfo | None]:
    """Return registry, log, the champion's number, the log's last move, and the champion.

    The champion is None although it has a number if it was deleted in MLflow.
    """
    registry, log = open_registry(), PromotionLog(current_store())
    require_in_registry(registry, log.store, lineage)
    number, last = settle_aliases(registry, log, lineage)
    return registry, log, number, last, registry.champion(lineage)


def _require_usable(version: VersionInfo, champion: VersionInfo | None) -> None:
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
    store = current_store()
    if not store.exists(f"{version.adapter_uri}/{WEIGHTS_FILE}"):
        raise RegistryError(f"{name} has no adapter in the store any more ({store.uri_of(version.adapter_uri)}).")


def find_left_behind(lineage: str) -> tuple[LeftBehind, ...]:
    """Return the accepted versions whose arrival the champion has not learned, oldest first, each arrival once.

    An arrival is left out if another version that learned it awaits approval or is in rollout.

    Raises:
        NoVersionError: The lineage has no version.
        RegistryError: The registry does not answer, or has lost the lineage.
    """
    registry = open_registry()
    versions = registry.versions(lineage)
    if not versions:
        raise no_version(registry, lineage)
    line = descent(versions, registry.champion(lineage))
    standings = {version.version: standing_of(version, line) for version in versions}
    waiting = [each for each in versions if standings[each.version] in ("awaiting approval", "in rollout")]
    known = {digest for version in (*line, *waiting) for digest in version.digests}
    found: list[LeftBehind] = []
    for version in reversed(versions):
        if standings[version.version] == "left behind" and not arrival_digests(version, versions) & known:
            known |= version.digests
            found.append(LeftBehind.model_validate(version))
    return tuple(reversed(found))
