"""An open branch of a lineage: what waits for its end, and the moves of the champion around it; see `infra.branches`.

While a branch is open, no run continues the champion, and new arrivals wait. A person can still roll the champion back;
the branch is then not swapped in, because it would bring back what the person has taken away.
"""

from __future__ import annotations

from deal_core.errors import RegistryError
from infra.branches import Acceptance, Branch, Branches
from infra.lineage_state import read_state
from infra.promotions import Change, PromotionLog
from infra.store.base import ObjectStore
from infra.versions import Version
from tasks.lineage.history import find_version
from tasks.lineage.promotion import move_champion
from tasks.notices import Notice, announce


class BranchOpenError(RegistryError):
    """Versions of the lineage are being made again, and new arrivals wait."""

    code = "branch-open"


class ChampionMovedError(RegistryError):
    """A person has moved the champion since the branch began. A swap would undo what the person has decided."""

    code = "champion-moved"

    def __init__(self, branch: Branch, champion: str | None) -> None:
        now = f"version {champion} is" if champion else "no version is"
        super().__init__(
            f"The branch of '{branch.lineage}' replaces version {branch.champion}, but {now} champion now: a person "
            f"has moved it since. Nothing was swapped. Make version {branch.champion} champion again (deal version "
            f"rollback {branch.champion} --lineage {branch.lineage}), or give the branch up (deal lineage branch "
            f"{branch.lineage} --give-up)."
        )


def require_no_branch(store: ObjectStore, lineage: str) -> None:
    """Raise BranchOpenError if the lineage has an open branch."""
    if (branch := Branches(store).open(lineage)) is not None:
        why = branch.why_waiting
        raise BranchOpenError(f"{why[0].upper()}{why[1:]}.")


def why_waiting(store: ObjectStore, lineage: str) -> str | None:
    """Return why a lineage learns nothing that lands, and what to do; None: it learns."""
    if (paused := read_state(store, lineage).paused) is not None:
        return f"it is paused ({paused}); it goes on with: deal lineage resume {lineage}"
    branch = Branches(store).open(lineage)
    return None if branch is None else branch.why_waiting


def stop_serving(store: ObjectStore, branch: Branch) -> None:
    """Let no version be champion until the branch is swapped in. The call can be repeated, also after the swap.

    Raises:
        ChampionMovedError: A person moves the champion just now.
    """
    log = PromotionLog(store)
    last = log.last(branch.lineage)
    if last is None or last.champion != branch.champion:  # it was done, or `swap_in` will refuse
        return
    change = Change(
        action="stopped",
        lineage=branch.lineage,
        version=branch.champion,
        before=branch.champion,
        champion=None,
        who=branch.who,
        why=f"nothing serves until it is made again {branch.what}",
    )
    if log.add(last, change) is None:
        raise ChampionMovedError(branch, last.champion)


def accept_result(store: ObjectStore, lineage: str, *, who: str, why: str) -> str:
    """Write down that a person accepts what `deal data delete --relearn` made, although it is worse than the champion.

    Returns:
        The digest that names the deleted arrival: `flows.relearn` goes on with it.

    Raises:
        RegistryError: No result of the lineage waits for a person.
    """
    branches = Branches(store)
    branch = branches.open(lineage)
    judgement = branches.judgement(branch) if branch else None
    if branch is None or branch.deleted is None or judgement is None or not judgement.reasons:
        raise RegistryError(
            f"No result of deal data delete --relearn waits to be accepted in lineage '{lineage}'. See: deal lineage "
            f"branch {lineage}",
            code="nothing-to-accept",
        )
    branches.judge(branch, judgement.model_copy(update={"accepted": Acceptance(who=who, why=why)}))
    return branch.deleted.sha256


def swap_in(store: ObjectStore, branch: Branch, tip: Version, who: str, accepted: str = "") -> None:
    """Make the tip of a branch champion, by one move that names the branch. The call can be repeated.

    `accepted` says why a person accepted it although it is worse.

    Raises:
        ChampionMovedError: A person has moved the champion since the branch began.
    """
    last = PromotionLog(store).last(branch.lineage)
    if last is not None and last.champion == tip.version:
        return
    require_unmoved(store, branch)
    is_old = tip.version == branch.root
    why = f"made again {branch.what}" + (f"; accepted although it is worse: {accepted}" if accepted else "")
    move_champion(
        store,
        tip,
        expected=None if branch.stops_serving else branch.champion,
        action="rolled back" if is_old else "promoted",
        who=who,
        why=why,
        branch=branch.number,
    )
    announce("rolled back" if is_old else "promoted", Notice.of(tip, reasons=(why,), who=who))


def require_unmoved(store: ObjectStore, branch: Branch) -> None:
    """Raise ChampionMovedError if a person has moved the champion since a branch that is not swapped in began."""
    last = PromotionLog(store).last(branch.lineage)
    champion = last.champion if last else None
    if champion != (None if branch.stops_serving else branch.champion):
        raise ChampionMovedError(branch, champion)


def serve_again(store: ObjectStore, branch: Branch, who: str) -> None:
    """Make the champion of before a branch champion again, if the branch had stopped it."""
    last = PromotionLog(store).last(branch.lineage)
    if last is not None and last.champion is None:
        version = find_version(store, branch.lineage, branch.champion)
        move_champion(store, version, expected=None, action="rolled back", who=who, why="its branch was given up")
