"""Automations that tell people what became of an adaptation: carried by the Prefect server, switched on by a person.

Each waits for one event of `tasks.notices`, and one for an automation of ours that failed, so that a run did not begin,
say; they hand it to a notification block of Prefect (Slack, e-mail, Teams, …).
Such an action needs the id of a block, so the block must be there first: DEAL_NOTIFICATION_BLOCK names it. Without one
the automations are there all the same, off and with nothing to do, so that the server shows what can be told.
"""

from __future__ import annotations

from datetime import timedelta
from uuid import UUID

from prefect.client.orchestration import PrefectClient
from prefect.events.actions import DoNothing, SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.exceptions import ObjectNotFound

from deal_core.errors import ConfigError
from flows.server.automations import NEVER_BEGAN, Resources, automations
from infra.settings import NoticeSettings
from tasks.inbox.announcements import LANDED
from tasks.notices import EVENTS, Kind

TITLES: dict[Kind, str] = {
    "promoted": "version {{ event.payload.version }} was promoted",
    "rejected": "version {{ event.payload.version }} was rejected",
    "awaiting-approval": "version {{ event.payload.version }} waits for approval",
    "rolled-back": "version {{ event.payload.version }} is champion again",
    "failed": "an adaptation failed",
}
BODY = """\
Lineage {{ event.payload.lineage }}, task {{ event.payload.task }}
{% for reason in event.payload.reasons %}- {{ reason }}
{% endfor %}{% if event.payload.error %}{{ event.payload.error }}
{% endif %}{% if event.payload.version %}deal report {{ event.payload.version }} --lineage {{ event.payload.lineage }}
{% endif %}"""
ACTION_FAILED = "prefect.automation.action.failed"
"""Prefect's own; its resource is the automation, and its payload has the reason."""


def notifications(block_id: UUID | None) -> list[AutomationCore]:
    """What the server shall carry, all of it off.

    Args:
        block_id: the notification block that is used; None: there is none as yet.
    """
    lineages: Resources = {"prefect.resource.id": "deal.lineage.*"}
    # none of those that tell: one whose block is broken would tell of itself without end
    working: Resources = {
        "prefect.resource.id": "prefect.automation.*",
        "prefect.resource.name": [LANDED, *(each.name for each in automations(NEVER_BEGAN))],
    }
    return [
        *(
            _telling(kind, event, lineages, f"{{{{ event.payload.lineage }}}}: {TITLES[kind]}", BODY, block_id)
            for kind, event in EVENTS.items()
        ),
        _telling(
            "automations that failed", ACTION_FAILED, working, "The automation {{ event.resource.name }} failed",
            "{{ event.payload.reason }}\nA run did not begin or did not come back; deal status shows what is open.",
            block_id,
        ),
    ]  # fmt: skip


def _telling(
    what: str, event: str, match: Resources, subject: str, body: str, block_id: UUID | None
) -> AutomationCore:
    """The automation that sends one event through the block; without a block it does nothing."""
    return AutomationCore(
        name=f"deal: tell of {what}",
        description=f"Sends what {event} says through a notification block; docs/notifications.md says how.",
        enabled=False,
        trigger=EventTrigger(
            match=match, expect={event}, posture=Posture.Reactive, threshold=1, within=timedelta(0),
        ),
        actions=[
            SendNotification(block_document_id=block_id, subject=subject, body=body) if block_id else DoNothing()
        ],
    )  # fmt: skip


async def apply_notifications(client: PrefectClient) -> None:
    """Put the automations on the server; one that is there stays on or off as it is, and without a block untouched.

    Raises:
        ConfigError: the block that DEAL_NOTIFICATION_BLOCK names is not on the server.
    """
    block_id = await _find_block(client, NoticeSettings().notification_block)
    for automation in notifications(block_id):
        known = await client.read_automations_by_name(automation.name)
        if not known:
            await client.create_automation(automation)
        elif block_id:
            kept = automation.model_copy(update={"enabled": known[0].enabled})
            await client.update_automation(known[0].id, kept)


async def _find_block(client: PrefectClient, name: str | None) -> UUID | None:
    if name is None:
        return None
    slug, _, document = name.partition("/")
    if not (slug and document):
        raise ConfigError(f"DEAL_NOTIFICATION_BLOCK is {name!r}; give type/name, such as slack-webhook/operators.")
    try:
        return (await client.read_block_document_by_name(document, slug)).id
    except ObjectNotFound:
        raise ConfigError(
            f"The Prefect server has no block {name}, which DEAL_NOTIFICATION_BLOCK names; make it first, in the "
            "server's pages under Blocks or as docs/notifications.md says."
        ) from None
