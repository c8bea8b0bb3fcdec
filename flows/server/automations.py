"""Automations that bring runs back whose process died: a Prefect server carries them, nobody has to look.

    a run falls silent (machine lost, worker killed)  → Crashed, by `silent runs`
    a run was handed to a worker and never began      → Crashed, by `runs that never began`
    a run that learns or watches has crashed          → scheduled once more, by `crashed runs`, three times at most

The run that is scheduled once more has the same id and goes on from its last checkpoint.
"""

from __future__ import annotations

from datetime import timedelta

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

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
