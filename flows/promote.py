"""Promote, roll back, reject, requeue, rebuild: a person decides which version of a lineage serves.

Promote, rollback and reject do not wait for a run: a rollback takes effect at once, and the run finds the champion
moved. Requeue learns again what a rollback left behind.
"""

from __future__ import annotations

import asyncio
import getpass
from collections.abc import Sequence
from contextlib import suppress

from prefect import flow
from pydantic import BaseModel

from deal_core.adapter.files import WEIGHTS_FILE
from deal_core.errors import RegistryError
from flows.adapt import learn_arrival
from flows.lock import hold_lineage
from flows.results import AdaptResult
from infra.ledger import Ledger
from infra.promotions import Action, Change, PromotionLog
from infra.tracking.registry import Registry, VersionInfo, open_registry
from infra.version_log import VersionLog
from tasks.adaptation.promote import champion_deleted, move_champion, note_learned, rejected_by_person, settle_aliases
from tasks.adaptation.resume import read_spec_of, require_same_files
from tasks.context import current_store
from tasks.lineage.history import find_version, unknown_lineage
from tasks.lineage.rebuild import RebuildResult, rebuild_lineage
from tasks.lineage.resolve_spec import arrival_of
from tasks.lineage.stored_lineage import require_in_registry
from tasks.lineage.tombstones import refuse_forgotten
from tasks.lineage.versions import arrival_digests, descent, standing_of
from tasks.notices import Kind, Notice, announce
from tasks.progress import Interrupted, ask_to_stop, raise_if_stopped
from tasks.spec import AdaptSpec, parse


class LeftBehind(BaseModel, frozen=True):
    """A version, and the arrival that it was trained on."""

    version: str
    task: str
    dataset_sha256: str


class Decision(BaseModel, frozen=True):
    """What a person decided."""

    action: Action
    lineage: str
    version: str
    before: str | None
    """The champion before."""
    champion: str | None
    """The champion now."""
    left_behind: tuple[LeftBehind, ...] = ()
    """What the champion before had learned and the one of now has not; `deal requeue` learns it again."""


@flow(name="promote", flow_run_name="promote-{lineage}-{version}")
def promote(lineage: str, version: str, who: str = "a deployment", why: str = "asked for") -> Decision:
    """Make the next version of a lineage its champion; see `promote_to`."""
    return promote_to(lineage, version, who=who, why=why)


@flow(name="rollback", flow_run_name="rollback-{lineage}")
def rollback(lineage: str, to: str | None = None, who: str = "a deployment", why: str = "asked for") -> Decision:
    """Make an earlier version of a lineage its champion; see `roll_back`."""
    return roll_back(lineage, to, who=who, why=why)


def promote_to(lineage: str, version: str, *, who: str, why: str) -> Decision:
    """Make a version the champion that continues the champion of now.

    Args:
        lineage: whose champion.
        version: the version's number.
        who: who decides.
        why: for what reason.

    Raises:
        RegistryError: the version does not fit: the message says why, and what to do.
    """
    registry, log, number, champion = _look(lineage)
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
            f"deal rollback --to {version} --lineage {lineage}" if any(each.version == version for each in line)
            else f"deal requeue {version} --lineage {lineage}, which learns its arrival again on top of the champion"
        )  # fmt: skip
        raise RegistryError(
            f"Version {version} of '{lineage}' continues {origin}, but "
            f"{f'version {number}' if number else 'no version'} is champion: what was learned since would "
            f"be lost. Use {remedy}."
        )
    note_learned(Ledger(log.store), found)  # first: cut short before the move, the arrival is known all the same
    move_champion(registry, log, found, expected=found.parent_version, action="promoted", who=who, why=why)
    _tell("promoted", found, who, why)
    return Decision(
        action="promoted", lineage=lineage, version=version, before=found.parent_version, champion=version,
    )  # fmt: skip


def roll_back(lineage: str, to: str | None, *, who: str, why: str) -> Decision:
    """Make an earlier champion the champion again.

    A champion that was deleted in MLflow can be replaced so, but what it had learned is not told then.

    Args:
        lineage: whose champion.
        to: number of a version that the champion continues, or that was champion before; None: the one that the
            champion continues.
        who: who decides.
        why: for what reason.

    Raises:
        RegistryError: there is nothing to go back to, or the version was never champion.
    """
    registry, log, number, champion = _look(lineage)
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
    _tell("rolled-back", found, who, why)
    return Decision(
        action="rolled back", lineage=lineage, version=to, before=number, champion=to,
        left_behind=left_behind(line, descent(versions, found)),
    )  # fmt: skip


def reject_version(lineage: str, version: str, *, who: str, why: str) -> Decision:
    """Say no to a version: it can never become champion.

    Raises:
        RegistryError: it is champion, or was refused already.
    """
    registry, log = open_registry(), PromotionLog(current_store())
    number, last = settle_aliases(registry, log, lineage)
    found = find_version(registry, lineage, version)
    if number == version:
        raise RegistryError(
            f"Version {version} of '{lineage}' is its champion; go back first: deal rollback --lineage {lineage}"
        )
    name = f"Version {version} of '{lineage}'"
    if not found.accepted:
        raise RegistryError(f"{name} is rejected already, by its gate: {' '.join(found.reasons)}")
    if found.approval == "refused":
        raise RegistryError(f"{name} is rejected already, {_rejection(log, lineage, version)}")
    change = Change(
        action="rejected", lineage=lineage, version=version, before=number, champion=number, who=who, why=why
    )
    added = log.add(last, change)
    if added is None:
        raise RegistryError(
            f"The champion of '{lineage}' was moved this moment; look at deal history --lineage {lineage}, and try "
            "again."
        )
    settle_aliases(registry, log, lineage)
    _tell("rejected", found, who, why)
    return Decision(action="rejected", lineage=lineage, version=version, before=number, champion=number)


def _rejection(log: PromotionLog, lineage: str, version: str) -> str:
    """By whom and why a version was rejected, where a person did it."""
    for move in reversed(log.moves(lineage)):
        if move.action == "rejected" and move.version == version:
            return f"by {move.who}: {move.why}"
    return "by a person; the promotion log does not say by whom"


def left_behind(before: Sequence[VersionInfo], now: Sequence[VersionInfo]) -> tuple[LeftBehind, ...]:
    """What one line of versions has learned and another has not, oldest first."""
    known = {digest for version in now for digest in version.digests}
    return tuple(
        LeftBehind(version=version.version, task=version.task, dataset_sha256=version.dataset_sha256)
        for version in reversed(before) if not arrival_digests(version, before) & known
    )  # fmt: skip


def current_account() -> str:
    """Name of the account that runs this process."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user need not have a name
        return "unknown account"


def _tell(kind: Kind, version: VersionInfo, who: str, why: str) -> None:
    notice = Notice(
        lineage=version.lineage, task=version.task, version=version.version, parent_version=version.parent_version,
        reasons=(why,), who=who, tracking_id=version.tracking_id, run_key=version.run_key,
    )  # fmt: skip
    announce(kind, notice)


def _look(lineage: str) -> tuple[Registry, PromotionLog, str | None, VersionInfo | None]:
    """Registry, log, the champion's number, and the champion; a number without one: it was deleted in MLflow."""
    registry, log = open_registry(), PromotionLog(current_store())
    require_in_registry(registry, log.store, lineage)
    number, _ = settle_aliases(registry, log, lineage)
    return registry, log, number, registry.champion(lineage)


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
    """Accepted versions whose arrival the champion has not learned, oldest first, each arrival once.

    Not those of which another version awaits approval.

    Raises:
        RegistryError: the lineage has no version.
    """
    registry = open_registry()
    versions = registry.versions(lineage)
    if not versions:
        raise RegistryError(unknown_lineage(lineage))
    line = descent(versions, registry.champion(lineage))
    standings = {version.version: standing_of(version, line) for version in versions}
    waiting = [version for version in versions if standings[version.version] == "awaiting approval"]
    known = {digest for version in (*line, *waiting) for digest in version.digests}
    found: list[LeftBehind] = []
    for version in reversed(versions):
        if standings[version.version] == "left behind" and not arrival_digests(version, versions) & known:
            known |= version.digests
            found.append(LeftBehind(version=version.version, task=version.task, dataset_sha256=version.dataset_sha256))
    return tuple(reversed(found))


@flow(name="requeue", flow_run_name="requeue-{lineage}")
async def requeue(lineage: str, versions: Sequence[str] = ()) -> list[AdaptResult]:
    """Learn the arrivals of versions again, with the settings of their runs, in the order given.

    What the champion has learned by the time it is their turn is reported as a repeat.

    Args:
        lineage: whose versions.
        versions: their numbers; none: all that were left behind, oldest first.

    Raises:
        RegistryError: there is no such version.
        DataValidationError: an arrival's file is gone, or another lies in its place.
        ForgottenRowsError: the rows of one were forgotten.
    """
    registry = open_registry()
    async with hold_lineage(lineage):
        numbers = versions or [each.version for each in find_left_behind(lineage)]
        found = [find_version(registry, lineage, number) for number in numbers]
        specs = [_spec_of(version) for version in found]
        return [await _learn(registry, spec, version) for spec, version in zip(specs, found, strict=True)]


async def _learn(registry: Registry, spec: AdaptSpec, version: VersionInfo) -> AdaptResult:
    run = await learn_arrival(spec, again=not _is_learned(registry, version))
    if run.version and run.status != "repeat":  # its dataset may be another one: of labels that the task has gained
        registry.tag_version(version.lineage, run.version, {"requeued_sha256": version.dataset_sha256})
        tagged = registry.version(version.lineage, run.version)
        if tagged is not None:
            VersionLog(current_store()).keep(tagged)
    return run


def _spec_of(version: VersionInfo) -> AdaptSpec:
    """What the run of a version was asked, once it is known that the same can be learned again."""
    store = current_store()
    refuse_forgotten(store, version.task, [version.dataset_sha256])
    spec = parse(AdaptSpec, dict(read_spec_of(version.adapter_uri)), f"version {version.version}")
    refuse_forgotten(store, version.task, require_same_files(store, arrival_of(spec), version))
    return spec


def _is_learned(registry: Registry, version: VersionInfo) -> bool:
    versions = registry.versions(version.lineage)
    wanted = arrival_digests(version, versions)
    return any(each.digests & wanted for each in descent(versions, registry.champion(version.lineage)))


async def rebuild(lineage: str) -> RebuildResult:
    """Register a lineage's versions again; see `tasks.lineage.rebuild`. Cancelled, it ends at the next version.

    Raises:
        LineageBusyError: a run works on the lineage.
    """
    raise_if_stopped()  # from here on the thread shares what asks it to stop
    async with hold_lineage(lineage, wait=False):
        working = asyncio.create_task(asyncio.to_thread(rebuild_lineage, lineage))
        try:
            return await asyncio.shield(working)
        except asyncio.CancelledError:
            ask_to_stop()
            with suppress(Interrupted):
                await working
            raise
