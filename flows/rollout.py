"""Rollout: a version that was tried on live traffic becomes champion, or is rejected, as the figures say.

A server looks every few minutes. Without one, `deal rollout check` does the same.
"""

from __future__ import annotations

from prefect import flow
from pydantic import BaseModel

from flows.promote import Decision, promote_to, reject_version
from infra.promotions import PromotionLog
from infra.tracking.registry import open_registry
from tasks.adaptation.promote import settle_aliases
from tasks.context import current_store
from tasks.lineage.history import ROLLOUT, find_version, known_lineages
from tasks.lineage.settings import for_each
from tasks.monitoring.look import RolloutStatus, look_at_rollout, require_open


class RolloutResult(BaseModel, frozen=True):
    """A look at a rollout, and what was done."""

    status: RolloutStatus
    decision: Decision | None = None
    """The version's promotion or rejection; None: the rollout goes on, or there is none."""


@flow(name="rollouts")
async def rollouts() -> list[RolloutResult]:
    """Look at all open rollouts, one after another, and end those that are decided.

    Raises:
        DealError: Some could not be looked at. All others were.
    """
    store = current_store()
    log, named = PromotionLog(store), open_registry().lineages_with("rollout")
    names = [name for name in known_lineages(store) if name in named or log.open_rollout(name) is not None]

    async def check(name: str) -> RolloutResult:
        return check_rollout(name)

    return await for_each(names, check, "could not be looked at")


def check_rollout(lineage: str) -> RolloutResult:
    """Make the version that is tried the champion, reject it, or let its rollout go on.

    An alias that does not fit the promotion log is set back first.

    Raises:
        RegistryError: The champion has changed meanwhile, or the version cannot become champion.
    """
    settle_aliases(open_registry(), PromotionLog(current_store()), lineage)
    status = look_at_rollout(lineage)
    if status.version is None or status.report is None or status.report.verdict == "goes on":
        return RolloutResult(status=status)
    why = f"{status.report.kind}: {'; '.join(status.report.reasons)}"
    if status.report.verdict == "abort":
        decision = reject_version(lineage, status.version, who=ROLLOUT, why=why)
    else:
        run = find_version(open_registry(), lineage, status.version).run_key
        decision = promote_to(lineage, status.version, who=ROLLOUT, why=why, run=run)
    return RolloutResult(status=status, decision=decision)


def finish_rollout(lineage: str, *, who: str, why: str) -> Decision:
    """Make the version that is tried on live traffic the champion, whatever the figures say.

    Raises:
        RegistryError: There is no rollout, or the version cannot become champion.
    """
    return promote_to(lineage, require_open(current_store(), lineage).version, who=who, why=why)


def abort_rollout(lineage: str, *, who: str, why: str) -> Decision:
    """Reject the version that is tried on live traffic.

    Raises:
        RegistryError: There is no rollout.
    """
    return reject_version(lineage, require_open(current_store(), lineage).version, who=who, why=why)
