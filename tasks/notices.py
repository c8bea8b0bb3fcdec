"""Notices: what became of an adaptation, told to the Prefect server as an event and to a webhook as signed JSON.

    promoted             → deal.version.promoted
    rejected             → deal.version.rejected
    awaiting-approval    → deal.version.awaiting-approval
    rolled-back          → deal.version.rolled-back
    failed               → deal.adaptation.failed

The event's resource is `deal.lineage.<name>`, its payload a `Notice`; docs/notifications.md describes both for those
who receive them. No notice holds a text of a row, unless an error does and the run may show texts.
"""

from __future__ import annotations

import json
import logging
import uuid
from datetime import UTC, datetime
from typing import Any, Literal

from prefect import runtime
from prefect.client.orchestration import get_client
from prefect.settings import get_current_settings
from pydantic import BaseModel, ConfigDict

from deal_core.errors import DealError
from deal_core.evaluation.report import EvaluationReport
from deal_core.masking import without_secrets
from infra.webhook import open_webhook
from tasks.progress import patient
from tasks.references import VersionRef

logger = logging.getLogger(__name__)

Kind = Literal["promoted", "rejected", "awaiting-approval", "rolled-back", "failed"]
EVENTS: dict[Kind, str] = {
    "promoted": "deal.version.promoted",
    "rejected": "deal.version.rejected",
    "awaiting-approval": "deal.version.awaiting-approval",
    "rolled-back": "deal.version.rolled-back",
    "failed": "deal.adaptation.failed",
}
MAX_MESSAGE_CHARS = 2000


class Notice(BaseModel):
    """The payload of an event, and the `payload` of a webhook's body; None where it does not apply."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    lineage: str
    task: str | None = None
    version: str | None = None
    parent_version: str | None = None
    """What the version continues; None for one that starts from the base model."""
    reasons: tuple[str, ...] = ()
    """Why the gate, or a person, rejected the version; or why a person moved the champion."""
    who: str | None = None
    """The person, where one decided."""
    accuracies: dict[str, float] = {}
    """Task to the version's accuracy on it, 0 to 1."""
    average_accuracy: float | None = None
    forgetting: float | None = None
    error: str | None = None
    """Why the adaptation failed."""
    tracking_id: str | None = None
    """The MLflow run; `report.html` among its artifacts is the page."""
    run_key: str | None = None


def announce(kind: Kind, notice: Notice, *, once: str | None = None) -> None:
    """Tell the Prefect server, if there is one, and the webhook, if one is set. Whatever fails is logged, never raised.

    It waits, minutes if need be, for a server that is away; call it where waiting does no harm.

    Args:
        kind: what happened.
        notice: to which version, and why.
        once: identity of what happened: told again, after a crash say, receivers know it as the same; None: each call
            is a notice of its own.
    """
    event = EVENTS[kind]
    identity = uuid.uuid4() if once is None else uuid.uuid5(uuid.NAMESPACE_URL, f"{event} {notice.lineage} {once}")
    occurred = datetime.now(UTC)
    for tell in (_tell_server, _tell_webhook):
        try:
            tell(event, identity, occurred, notice)
        except Exception as error:  # a version is promoted whether or not anybody hears of it
            reason = without_secrets(str(error).split("\n")[0])
            logger.error("Nobody was told of %s by %s: %s: %s", event, tell.__name__, type(error).__name__, reason)


def announce_version(version: VersionRef, *, task: str, evaluation: EvaluationReport, tracking_id: str) -> None:
    """Announce how the run of a version ended: once, however often the end of the run is repeated."""
    matrix = evaluation.matrix
    notice = Notice(
        lineage=version.lineage,
        task=task,
        version=version.version,
        parent_version=version.parent_version,
        reasons=version.reasons,
        accuracies=dict(evaluation.accuracies),
        average_accuracy=matrix.average_accuracy,
        forgetting=matrix.forgetting,
        tracking_id=tracking_id,
        run_key=version.run_key,
    )
    announce(version.outcome, notice, once=version.run_key)


def announce_failure(lineage: str, task: str, error: Exception) -> None:
    """Announce that an adaptation failed.

    Of an error that is not ours only the kind is told, as nobody knows what it quotes.
    """
    words = " ".join(str(error).split()) if isinstance(error, DealError) else "see the run's log"
    message = without_secrets(f"{type(error).__name__}: {words}")[:MAX_MESSAGE_CHARS]
    announce("failed", Notice(lineage=lineage, task=task, error=message))


def _tell_server(event: str, identity: uuid.UUID, occurred: datetime, notice: Notice) -> None:
    if not get_current_settings().api.url:  # embedded: nobody listens
        return
    run_id = runtime.flow_run.id
    related = [{"prefect.resource.id": f"prefect.flow-run.{run_id}", "prefect.resource.role": "flow-run"}]
    _post_event(
        {
            "id": str(identity),
            "event": event,
            "occurred": occurred.isoformat(),
            "resource": {"prefect.resource.id": f"deal.lineage.{notice.lineage}",
                         "prefect.resource.name": notice.lineage},
            "related": related if run_id else [],
            "payload": notice.model_dump(mode="json"),
        }
    )  # fmt: skip


@patient
def _post_event(event: dict[str, Any]) -> None:
    """Hand an event in and see it taken, which `emit_event` leaves to a thread that ends with the process."""
    with get_client(sync_client=True) as client:
        client.request("POST", "/events", json=[event]).raise_for_status()


def _tell_webhook(event: str, identity: uuid.UUID, occurred: datetime, notice: Notice) -> None:
    webhook = open_webhook()
    if webhook is None:
        return
    payload = notice.model_dump(mode="json")
    body = {"id": str(identity), "event": event, "occurred": occurred.isoformat(), "payload": payload}
    webhook.send(event, json.dumps(body, ensure_ascii=False, allow_nan=False).encode(), identity)
