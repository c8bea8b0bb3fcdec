"""Automations on a Prefect server: they restart runs whose process died, and send notifications.

    a run sends no heartbeat (machine lost, worker killed)  → Crashed, by `silent runs`
    a worker took a run and did not start it                → Crashed, by `runs that never began`
    a run of one file, or one that watches, has crashed     → scheduled again, by `crashed runs`, at most three times
    a run that learns what has landed has crashed           → `flows.sensor` starts another one

A run that is scheduled again keeps its id and continues from its last checkpoint.

Each notifying automation sends one kind of event of `tasks.notices` to a notification block of Prefect (Slack, e-mail,
Teams). DEAL_NOTIFICATION_BLOCK names the block. Without a block, these automations exist on the server but do nothing.
They are off until a person switches them on.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from uuid import UUID

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ActionTypes, ChangeFlowRunState, DoNothing, SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.exceptions import ObjectNotFound

from deal_core.errors import ConfigError
from infra.settings import NoticeSettings
from tasks.notices import EVENTS, Kind

Resources = dict[str, str | list[str]]

HEARTBEAT = "prefect.flow-run.heartbeat"
OVER = {f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Cancelling", "Crashed")}
RUNS: Resources = {"prefect.resource.id": "prefect.flow-run.*"}
RUN = {"prefect.resource.id"}
"""A trigger looks at each run separately."""
OURS: Resources = {"prefect.resource.id": "prefect.tag.deal", "prefect.resource.role": "tag"}
RETURNING = ["adapt-file", "watch-inbox"]
"""Deployments whose runs can start again, because a repetition changes nothing. A rollback cannot. Instead of a run of
`adapt` the sensor starts another one."""
THEIRS: Resources = {"prefect.resource.role": "deployment", "prefect.resource.name": RETURNING}
SILENT = timedelta(seconds=90)
"""Time of three heartbeats. prefect.yaml sets PREFECT_FLOWS_HEARTBEAT_FREQUENCY to 30 s."""
NEVER_BEGAN = timedelta(hours=1)
"""Longest wait of a run for its image or for a GPU of the cluster."""
PROCESS_NEVER_BEGAN = timedelta(minutes=3)
"""The same for a run that is a process of its worker and waits for nothing. A waiting run occupies its pool."""
NEVER_STARTED = "A worker took it and never started it."
MAX_RERUNS = 3
"""Prefect counts the first start too: after it the count is 1."""
TITLES: dict[Kind, str] = {
    "promoted": "version {{ event.payload.version }} was promoted",
    "rejected": "version {{ event.payload.version }} was rejected",
    "awaiting approval": "version {{ event.payload.version }} waits for approval",
    "rollout": "version {{ event.payload.version }} is tried on live traffic",
    "rolled back": "version {{ event.payload.version }} is champion again",
    "alias set back": "a move of the alias in MLflow was set back",
    "held": "labels of {{ event.payload.task }} disagree with version {{ event.payload.version }}",
    "failed": "an adaptation failed",
    "drift": "live traffic of {{ event.payload.task }} has changed",
    "quality": "live accuracy of {{ event.payload.task }} has dropped",
    "decayed": "version {{ event.payload.version }} is worse on {{ event.payload.task }} than the one before was",
}
BODY = """\
Lineage {{ event.payload.lineage }}\
{% if event.payload.task %}, task {{ event.payload.task }}\
{% elif event.payload.arrivals %}, consolidation of {{ event.payload.arrivals }} arrivals{% endif %}
{% for reason in event.payload.reasons %}- {{ reason }}
{% endfor %}{% if event.payload.error %}{{ event.payload.error }}
{% endif %}{% if event.payload.version %}deal version show {{ event.payload.version }} \
--report --lineage {{ event.payload.lineage }}
{% endif %}{% if event.payload.decide_url %}Decide: {{ event.payload.decide_url }}
{% endif %}"""
ACTION_FAILED = "prefect.automation.action.failed"
"""Event of Prefect. Its resource is the automation; its payload contains the reason."""


def automations(never_began: timedelta) -> list[AutomationCore]:
    """Return the automations for lost runs. A run that does not begin within `never_began` counts as crashed."""
    return [
        _automation(
            "silent runs",
            "A run that sends no heartbeat has lost its process and becomes Crashed.",
            ChangeFlowRunState(state=StateType.CRASHED, message="No heartbeat: its process is gone."),
            match=RUNS,
            match_related=OURS,
            after={HEARTBEAT},
            expect={HEARTBEAT, *OVER},
            for_each=RUN,
            within=SILENT,
        ),
        _automation(
            "runs that never began",
            "A run that a worker took and never started becomes Crashed.",
            ChangeFlowRunState(state=StateType.CRASHED, message=NEVER_STARTED),
            match=RUNS,
            match_related=OURS,
            after={"prefect.flow-run.Pending", "prefect.flow-run.Submitting"},
            expect={"prefect.flow-run.*"},
            for_each=RUN,
            within=never_began,
        ),
        _automation(
            "crashed runs",
            "A run whose process died starts again and continues from its last checkpoint.",
            ChangeFlowRunState(
                state=StateType.SCHEDULED, name="AwaitingRetry", message="Its process died; it starts again."
            ),
            match={**RUNS, "prefect.run-count": [str(number) for number in range(1, MAX_RERUNS + 1)]},
            match_related=THEIRS,
            expect={"prefect.flow-run.Crashed"},
            for_each=RUN,
        ),
        _automation(
            "runs to begin again",
            "A run that a worker took and never started starts again.",
            ChangeFlowRunState(state=StateType.SCHEDULED, name="AwaitingRetry", message="It starts again."),
            # others at 0 ended before they began, as in a broken installation: they would do so again
            match={**RUNS, "prefect.run-count": "0", "prefect.state-message": NEVER_STARTED},
            match_related=THEIRS,
            expect={"prefect.flow-run.Crashed"},
            for_each=RUN,
        ),
    ]


def _automation(
    name: str,
    description: str,
    action: ActionTypes,
    *,
    within: timedelta | None = None,
    enabled: bool = True,
    **trigger: Any,
) -> AutomationCore:
    """Return an automation that reacts to an expected event or, with `within`, to its absence for so long."""
    return AutomationCore(
        name=f"deal: {name}",
        description=description,
        enabled=enabled,
        actions=[action],
        trigger=EventTrigger(
            posture=Posture.Proactive if within else Posture.Reactive,
            within=within or timedelta(0),
            threshold=1,
            **trigger,
        ),
    )


async def apply_automations(client: PrefectClient, never_began: timedelta) -> None:
    """Create the automations for lost runs on the server, or replace those of the same names."""
    for automation in automations(never_began):
        await _apply(client, automation)


async def _apply(client: PrefectClient, automation: AutomationCore, *, replace: bool = True) -> None:
    """Create an automation. With `replace`, one of the same name is replaced, and stays on or off."""
    present = await client.read_automations_by_name(automation.name)
    if not present:
        await client.create_automation(automation)
    elif replace:
        kept = automation.model_copy(update={"enabled": present[0].enabled})
        await client.update_automation(present[0].id, kept)
    for double in present[1:]:
        await client.delete_automation(double.id)


def notifications(block_id: UUID | None) -> list[AutomationCore]:
    """Return the notifying automations, all of them off. Without a notification block, they do nothing."""
    lineages: Resources = {"prefect.resource.id": "deal.lineage.*"}
    # not the notifying automations: one with a broken block would notify of its own failure without end
    working: Resources = {
        "prefect.resource.id": "prefect.automation.*",
        "prefect.resource.name": [automation.name for automation in automations(NEVER_BEGAN)],
    }
    return [
        *(
            _notifying(kind, event, lineages, f"{{{{ event.payload.lineage }}}}: {TITLES[kind]}", BODY, block_id)
            for kind, event in EVENTS.items()
        ),
        _notifying(
            "automations that failed",
            ACTION_FAILED,
            working,
            "The automation {{ event.resource.name }} failed",
            "{{ event.payload.reason }}\nA run did not begin or did not come back; deal status shows what is open.",
            block_id,
        ),
    ]


def _notifying(
    what: str, event: str, match: Resources, subject: str, body: str, block_id: UUID | None
) -> AutomationCore:
    """Return an automation that sends one kind of event through the block."""
    return _automation(
        f"tell of {what}",
        f"Sends {event} through a notification block; see docs/retrain.md.",
        SendNotification(block_document_id=block_id, subject=subject, body=body) if block_id else DoNothing(),
        enabled=False,
        match=match,
        expect={event},
    )


async def apply_notifications(client: PrefectClient) -> None:
    """Create the notifying automations on the server. Existing ones change only if there is a block.

    Raises:
        ConfigError: The server has no block of the name in DEAL_NOTIFICATION_BLOCK.
    """
    block_id = await _find_block(client, NoticeSettings().notification_block)
    for automation in notifications(block_id):
        await _apply(client, automation, replace=block_id is not None)


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
            "server's pages under Blocks or as docs/retrain.md says."
        ) from None
