"""Promote, roll back, reject: a person decides which version of a lineage serves."""

from __future__ import annotations

import asyncio
from typing import Annotated

from prefect import flow
from pydantic import StringConstraints

from deal_core.errors import in_one_line
from deal_core.safe_text import listed
from flows.mlflow import mirror
from infra.store.base import ObjectStore
from infra.store.opening import open_store
from infra.versions import Decision
from tasks.lineage.promotion import (
    Verdict,
    announce_decision,
    decide_on,
    promote_to,
    reject_version,
    roll_back,
)
from tasks.notices import why_server_is_away

Stated = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=1000)]
"""A text that a person must give."""


@flow(name="promote", flow_run_name="promote-{lineage}-{version}")
async def promote(lineage: str, version: str, who: str = "a deployment", why: str = "asked for") -> Decision:
    """Make the next version of a lineage its champion; see `promote_to`."""
    store = open_store()
    done = promote_to(store, lineage, version, who=who, why=why)
    await tell(store, done)
    return done


@flow(name="rollback", flow_run_name="rollback-{lineage}")
async def rollback(lineage: str, to: str | None = None, who: str = "a deployment", why: str = "asked for") -> Decision:
    """Make an earlier version of a lineage its champion; see `roll_back`."""
    store = open_store()
    done = roll_back(store, lineage, to, who=who, why=why)
    await tell(store, done)
    return done


@flow(name="reject", flow_run_name="reject-{lineage}-{version}")
async def reject(lineage: str, version: str, why: str, who: str = "a deployment") -> Decision:
    """Reject a version, so that it can never become champion; see `reject_version`."""
    store = open_store()
    done = reject_version(store, lineage, version, who=who, why=why)
    await tell(store, done)
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
    store = open_store()
    done = decide_on(store, lineage, version, verdict, who=who, why=why)
    await tell(store, done)
    return done


async def tell(store: ObjectStore, done: Decision) -> None:
    """Announce what was decided, and bring MLflow in step. Nothing that fails here undoes the decision."""
    announce_decision(store, done)
    await mirror(store, done.lineage)


def tell_once(store: ObjectStore, done: Decision) -> str:
    """Do the same for a command, which does not wait for a server that is away.

    Return what could not be told, in one line; empty if all was told.
    """
    away = why_server_is_away()
    remarks = []
    try:
        untold = announce_decision(store, done, to_server=away is None)
        if "webhook" in untold:
            remarks.append("The webhook did not take the notice.")
        if away is not None:  # without the server, nobody knows whether a run works on the lineage
            follows = "MLflow follows with the next run or deal server sync."
            return " ".join([away, "It was not told of this, which holds all the same.", follows, *remarks])
        synced = asyncio.run(mirror(store, done.lineage))
    except Exception as error:  # the decision stands, and its command has said so
        return " ".join([*remarks, f"Not all were told: {in_one_line(error)}"])
    if synced is None:
        remarks.append("MLflow follows when the run that works on the lineage ends.")
    elif synced.problem is not None:
        missing = f"MLflow lacks {listed(synced.missing)}; the next run or deal server sync writes it."
        remarks += [missing, synced.problem]
    return " ".join(remarks)
