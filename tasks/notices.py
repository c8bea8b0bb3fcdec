"""Notices about adaptations and live traffic: events for the Prefect server and signed JSON for a webhook.

The event's resource is `deal.lineage.NAME`. Its payload is a `Notice`; docs/retrain.md describes both. A notice
contains no text of a row, unless an error quotes one and the run may show texts.
"""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from typing import Any, Literal, Self
from urllib.parse import quote

from prefect import runtime
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, get_current_settings, temporary_settings
from prefect.utilities.urls import url_for
from pydantic import BaseModel

from deal_core.errors import DealError
from deal_core.evaluation.interval import SURE_ROWS, wilson_interval
from deal_core.evaluation.report import EvaluationReport
from deal_core.safe_text import without_secrets
from infra.disk import disk_full
from infra.versions import Version
from infra.webhook import open_webhook
from tasks.progress import Interrupted, patient

logger = logging.getLogger(__name__)

Kind = Literal[
    "promoted",
    "rejected",
    "awaiting-approval",
    "rollout",
    "rolled-back",
    "alias-set-back",
    "held",
    "failed",
    "drift",
    "quality",
    "decayed",
]
EVENTS: dict[Kind, str] = {
    "promoted": "deal.version.promoted",
    "rejected": "deal.version.rejected",
    "awaiting-approval": "deal.version.awaiting-approval",
    "rollout": "deal.version.rollout",
    "rolled-back": "deal.version.rolled-back",
    "alias-set-back": "deal.alias.set-back",
    "held": "deal.arrival.held",
    "failed": "deal.adaptation.failed",
    "drift": "deal.drift.detected",
    "quality": "deal.quality.dropped",
    "decayed": "deal.champion.decayed",
}
MAX_MESSAGE_CHARS = 2000
LOOK_SECONDS = 5.0
"""Patience of one look at the Prefect server."""
DECIDE = "decide/decide"
"""Flow and deployment with which a person decides about a version that waits."""


class Notice(BaseModel, frozen=True, extra="forbid"):
    """The payload of an event and of a webhook's body. A field that does not apply is None or empty."""

    schema_version: Literal[1] = 1
    lineage: str
    task: str | None = None
    """The task that the version learned; None: it is a consolidation, or one has failed."""
    arrivals: int | None = None
    """Number of arrivals that a consolidation learned together; None: it is none."""
    version: str | None = None
    parent_version: str | None = None
    """The version that this version continues; None: it starts from the base model."""
    reasons: tuple[str, ...] = ()
    """Why the gate or a person rejected the version, what drops the gate that passed it could not have seen, why a
    person moved the champion, why an arrival is held, or what has changed in the live traffic."""
    who: str | None = None
    """The person who decided."""
    accuracies: dict[str, float] = {}
    """Accuracy of the version by task, 0 to 1."""
    intervals: dict[str, tuple[float, float]] = {}
    """The 95 % interval of each accuracy, 0 to 1; only below 400 test rows."""
    num_rows: dict[str, int] = {}
    """Test rows of each accuracy."""
    average_accuracy: float | None = None
    forgetting: float | None = None
    error: str | None = None
    """Why the adaptation failed."""
    run_key: str | None = None
    """The run. The MLflow run with this value as its tag `deal.run_key` has the report as `report.html`."""
    decide_url: str | None = None
    """The form on Prefect's page with which a person approves or rejects a version that waits."""

    @classmethod
    def of(cls, version: Version, **more: Any) -> Self:
        """Return a notice about a registered version; `more` are the other fields, or replace its own."""
        own = {name: getattr(version, name) for name in ("lineage", "version", "parent_version", "run_key")}
        lesson = {"arrivals": len(version.arrivals)} if version.is_consolidation else {"task": version.task}
        return cls(**(own | lesson | more))


def announce(kind: Kind, notice: Notice, *, once: str | None = None, to_server: bool = True) -> tuple[str, ...]:
    """Send a notice to the Prefect server and to the webhook, where they are configured; return who was not told.

    The call waits up to minutes for a server that is away. An error is logged, never raised. `once` is the identity of
    the event, by which receivers recognise a repeated event; None: every call is a new event. Without `to_server`, the
    webhook alone is told: the caller knows that the server is away.
    """
    event = EVENTS[kind]
    identity = uuid.uuid4() if once is None else uuid.uuid5(uuid.NAMESPACE_URL, f"{event} {notice.lineage} {once}")
    occurred = datetime.now(UTC)
    if kind == "awaiting-approval" and to_server:
        notice = notice.model_copy(update={"decide_url": _decide_url(notice)})
    payload = notice.model_dump(mode="json")
    message = {"id": str(identity), "event": event, "occurred": occurred.isoformat(), "payload": payload}
    untold = [] if to_server else ["Prefect server"]
    for receiver, send in (("Prefect server", _tell_server), ("webhook", _tell_webhook)):
        try:
            is_told = receiver in untold or send(message)
        except Exception as error:  # a failed notice must not undo a promotion
            reason = without_secrets(str(error).split("\n")[0])
            logger.error("The %s did not receive %s: %s: %s", receiver, event, type(error).__name__, reason)
            is_told = False
        if not is_told:
            untold.append(receiver)
    return tuple(untold)


def why_server_is_away() -> str | None:
    """Look once whether the Prefect server answers; return in a sentence that it does not. None: it does, or is none.

    A command asks before it tells the server something: what waits for the server waits for minutes.
    """
    url = get_current_settings().api.url
    if not url:
        return None
    try:
        with (
            temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}),
            get_client(sync_client=True, httpx_settings={"timeout": LOOK_SECONDS}) as client,
        ):
            client.request("GET", "/health").raise_for_status()
    except Exception as error:  # whatever it is: nothing can be told
        return f"The Prefect server at {without_secrets(url)} does not answer ({type(error).__name__})."
    return None


def announce_version(version: Version, *, evaluation: EvaluationReport) -> None:
    """Announce how the run of a version ended. Receivers count repeated calls once.

    A version of a branch is not announced: the end of its branch is.
    """
    if version.branch is not None:
        return
    notice = Notice.of(
        version,
        reasons=(*version.reasons, *version.unsure),
        accuracies=dict(evaluation.accuracies),
        intervals={
            name: wilson_interval(score, evaluation.num_rows[name])
            for name, score in evaluation.accuracies.items()
            if evaluation.num_rows.get(name, SURE_ROWS) < SURE_ROWS
        },
        num_rows=dict(evaluation.num_rows),
        average_accuracy=version.average_accuracy,
        forgetting=version.forgetting,
    )
    announce(version.outcome, notice, once=version.run_key)


def announce_held(lineage: str, task: str, why: str, *, champion: str, arrival: str) -> None:
    """Announce that the labels of an arrival disagree with the champion. `arrival` is the digest of its rows."""
    announce("held", Notice(lineage=lineage, task=task, version=champion, reasons=(why,)), once=arrival)


def announce_failure(lineage: str, task: str | None, error: Exception) -> None:
    """Announce that an adaptation failed. Only a DealError's text is sent: the text of others may quote anything."""
    words = " ".join(str(error).split()) if isinstance(error, DealError) else "see the run's log"
    message = without_secrets(f"{type(error).__name__}: {words}")[:MAX_MESSAGE_CHARS]
    announce("failed", Notice(lineage=lineage, task=task, error=message))


@asynccontextmanager
async def announcing_failure(lineage: str, task: str | None) -> AsyncIterator[None]:
    """Announce the error of the block; turn the error of a full disk into one that says so."""
    try:
        yield
    except Interrupted:
        raise
    except Exception as error:
        full = disk_full(error)
        await asyncio.to_thread(announce_failure, lineage, task, full or error)
        if full is not None and full is not error:
            raise full from error
        raise


@patient
def _tell_server(message: dict[str, Any]) -> bool:
    """Post an event and wait for the answer. `emit_event` would use a thread that ends with the process."""
    if not get_current_settings().api.url:  # the embedded server has no listeners
        return True
    lineage, run_id = message["payload"]["lineage"], runtime.flow_run.id
    run = {"prefect.resource.id": f"prefect.flow-run.{run_id}", "prefect.resource.role": "flow-run"}
    resource = {"prefect.resource.id": f"deal.lineage.{lineage}", "prefect.resource.name": lineage}
    event = {**message, "related": [run] if run_id else [], "resource": resource}
    with get_client(sync_client=True) as client:
        client.request("POST", "/events", json=[event]).raise_for_status()
    return True


def _tell_webhook(message: dict[str, Any]) -> bool:
    webhook = open_webhook()
    body = json.dumps(message, ensure_ascii=False, allow_nan=False).encode()
    return webhook is None or webhook.send(message["event"], body, uuid.UUID(message["id"]))


def _decide_url(notice: Notice) -> str | None:
    """Return the address of the form of the deployment `decide`, filled in; None: there is no server that has it."""

    @patient
    def page_of_form() -> str | None:
        with get_client(sync_client=True) as client, suppress(ObjectNotFound):
            return url_for("deployment", client.read_deployment_by_name(DECIDE).id)
        return None

    if not get_current_settings().api.url:
        return None
    try:
        page = page_of_form()
    except Exception as error:  # the notice is sent without the link
        logger.warning("The notice has no link to decide: %s: %s", type(error).__name__, without_secrets(str(error)))
        return None
    parameters = quote(json.dumps({"lineage": notice.lineage, "version": notice.version}))
    return page and f"{page}/run?parameters={parameters}"
