"""Automations on a Prefect server: they bring back runs whose process died, and tell people what became of a run.

    a run sends no heartbeat (machine lost, worker killed)  → Crashed, by `silent runs`
    a worker took a run and did not start it                → Crashed, by `runs that never began`
    a run that learns or watches has crashed                → scheduled again, by `crashed runs`, at most three times

The run that is scheduled again has the same id and continues from its last checkpoint.

The automations that tell people hand one event of `tasks.notices` each to a notification block of Prefect (Slack,
e-mail, Teams). DEAL_NOTIFICATION_BLOCK names the block. Without a block these automations are on the server, switched
off, so that the server shows what can be told.
"""

from __future__ import annotations

from datetime import timedelta
from uuid import UUID

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState, DoNothing, SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.exceptions import ObjectNotFound

from deal_core.errors import ConfigError
from infra.settings import NoticeSettings
from tasks.inbox import LANDED
from tasks.notices import EVENTS, Kind

Resources = dict[str, str | list[str]]

HEARTBEAT = "prefect.flow-run.heartbeat"
OVER = {f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed")}
RUNS: Resources = {"prefect.resource.id": "prefect.flow-run.*"}
OURS: Resources = {"prefect.resource.id": "prefect.tag.deal", "prefect.resource.role": "tag"}
RETURNING = ["adapt", "adapt-file", "watch-inbox"]
"""Deployments whose runs may start again: what they do twice is done once, unlike a rollback."""
THEIRS: Resources = {"prefect.resource.role": "deployment", "prefect.resource.name": RETURNING}
SILENT = timedelta(seconds=90)
"""Three heartbeats missed: workers set PREFECT_FLOWS_HEARTBEAT_FREQUENCY to 30, see prefect.yaml."""
NEVER_BEGAN = timedelta(hours=1)
"""A run may wait so long for its image, or for a GPU of the cluster."""
PROCESS_NEVER_BEGAN = timedelta(minutes=3)
"""One that is a process of its worker waits for nothing; until it is given up it keeps its place in the pool."""
MAX_RERUNS = 3
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


def automations(never_began: timedelta) -> list[AutomationCore]:
    """What the server shall carry; a run that a worker took is given up after `never_began`."""
    return [
        AutomationCore(
            name="deal: silent runs",
            description="A run that sends no heartbeat any more has lost its process; its state says so.",
            trigger=EventTrigger(
                match=RUNS, match_related=OURS, after={HEARTBEAT}, expect={HEARTBEAT, *OVER},
                for_each={"prefect.resource.id"}, posture=Posture.Proactive, threshold=1, within=SILENT,
            ),
            actions=[ChangeFlowRunState(state=StateType.CRASHED, message="No heartbeat: its process is gone.")],
        ),
        AutomationCore(
            name="deal: runs that never began",
            description="A run that a worker took and did not start, since the worker died, say.",
            trigger=EventTrigger(
                match=RUNS, match_related=OURS, after={"prefect.flow-run.Pending", "prefect.flow-run.Submitting"},
                expect={"prefect.flow-run.*"}, for_each={"prefect.resource.id"}, posture=Posture.Proactive,
                threshold=1, within=never_began,
            ),
            actions=[ChangeFlowRunState(state=StateType.CRASHED, message="A worker took it and never started it.")],
        ),
        AutomationCore(
            name="deal: crashed runs",
            description="A run whose process died starts again; one that learns goes on from its checkpoint.",
            trigger=EventTrigger(
                match={**RUNS, "prefect.run-count": [str(number) for number in range(MAX_RERUNS)]},
                match_related=THEIRS, expect={"prefect.flow-run.Crashed"}, for_each={"prefect.resource.id"},
                posture=Posture.Reactive, threshold=1, within=timedelta(0),
            ),
            actions=[
                ChangeFlowRunState(
                    state=StateType.SCHEDULED, name="AwaitingRetry", message="Its process died; it starts again."
                )
            ],
        ),
    ]  # fmt: skip


async def apply_automations(client: PrefectClient, never_began: timedelta) -> None:
    """Put the automations on the server, in place of what it has under their names."""
    for automation in automations(never_began):
        known = await client.read_automations_by_name(automation.name)
        if known:
            await client.update_automation(known[0].id, automation)
        else:
            await client.create_automation(automation)
        for double in known[1:]:
            await client.delete_automation(double.id)


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
