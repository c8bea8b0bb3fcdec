"""Promote, roll back, reject, rebuild: a person decides which version of a lineage serves."""

from __future__ import annotations

from typing import Annotated

from prefect import flow
from pydantic import StringConstraints

from flows.lock import lock_lineage
from tasks.lineage.decisions import Decision, Verdict, decide_on, promote_to, reject_version, roll_back
from tasks.lineage.rebuild import RebuildResult, rebuild_lineage
from tasks.progress import raise_if_stopped, to_the_end

Stated = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=1000)]
"""A text that a person must give."""


@flow(name="promote", flow_run_name="promote-{lineage}-{version}")
def promote(lineage: str, version: str, who: str = "a deployment", why: str = "asked for") -> Decision:
    """Make the next version of a lineage its champion; see `promote_to`."""
    return promote_to(lineage, version, who=who, why=why)


@flow(name="rollback", flow_run_name="rollback-{lineage}")
def rollback(lineage: str, to: str | None = None, who: str = "a deployment", why: str = "asked for") -> Decision:
    """Make an earlier version of a lineage its champion; see `roll_back`."""
    return roll_back(lineage, to, who=who, why=why)


@flow(name="reject", flow_run_name="reject-{lineage}-{version}")
def reject(lineage: str, version: str, why: str, who: str = "a deployment") -> Decision:
    """Reject a version, so that it can never become champion; see `reject_version`."""
    return reject_version(lineage, version, who=who, why=why)


@flow(name="decide", flow_run_name="decide-{lineage}-{version}")
def decide(lineage: str, version: str, verdict: Verdict, why: Stated, who: Stated) -> Decision:
    """Approve or reject a version that waits for a person. The promotion log keeps who decided and why.

    Args:
        lineage: Its lineage.
        version: Its number.
        verdict: approve makes the version champion. reject keeps a new version from ever becoming champion; of a
            version that was asked for by a move of the alias, it only ends the request.
        why: The reason.
        who: Who decides. Prefect's own server knows no accounts, so the name is as given.

    Raises:
        RegistryError: The version does not wait for a person any more, or cannot become champion.
    """
    return decide_on(lineage, version, verdict, who=who, why=why)


async def rebuild(lineage: str) -> RebuildResult:
    """Register a lineage's versions again; see `tasks.lineage.rebuild`. If cancelled, it ends at the next version.

    Raises:
        LineageBusyError: A run works on the lineage.
    """
    raise_if_stopped()  # creates the request to stop, which the thread then shares
    async with lock_lineage(lineage, wait=False):
        return await to_the_end(rebuild_lineage, lineage)
