"""Promote, roll back, reject: a person decides which version of a lineage serves."""

from __future__ import annotations

from typing import Annotated

from prefect import flow
from pydantic import StringConstraints

from flows.mlflow import mirror
from infra.promotions import Decision
from tasks.lineage.promotion import Verdict, decide_on, promote_to, reject_version, roll_back

Stated = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=1000)]
"""A text that a person must give."""


@flow(name="promote", flow_run_name="promote-{lineage}-{version}")
async def promote(lineage: str, version: str, who: str = "a deployment", why: str = "asked for") -> Decision:
    """Make the next version of a lineage its champion; see `promote_to`."""
    done = promote_to(lineage, version, who=who, why=why)
    await mirror(lineage)
    return done


@flow(name="rollback", flow_run_name="rollback-{lineage}")
async def rollback(lineage: str, to: str | None = None, who: str = "a deployment", why: str = "asked for") -> Decision:
    """Make an earlier version of a lineage its champion; see `roll_back`."""
    done = roll_back(lineage, to, who=who, why=why)
    await mirror(lineage)
    return done


@flow(name="reject", flow_run_name="reject-{lineage}-{version}")
async def reject(lineage: str, version: str, why: str, who: str = "a deployment") -> Decision:
    """Reject a version, so that it can never become champion; see `reject_version`."""
    done = reject_version(lineage, version, who=who, why=why)
    await mirror(lineage)
    return done


@flow(name="decide", flow_run_name="decide-{lineage}-{version}")
async def decide(lineage: str, version: str, verdict: Verdict, why: Stated, who: Stated) -> Decision:
    """Approve or reject a version that waits for a person. The promotion log keeps who decided and why.

    Args:
        lineage: Its lineage.
        version: Its number.
        verdict: approve makes the version champion, or begins its rollout. reject keeps it from ever becoming champion.
        why: The reason.
        who: Who decides. Prefect's own server knows no accounts, so the name is as given.

    Raises:
        RegistryError: The version does not wait for a person any more, or cannot become champion.
    """
    done = decide_on(lineage, version, verdict, who=who, why=why)
    await mirror(lineage)
    return done
