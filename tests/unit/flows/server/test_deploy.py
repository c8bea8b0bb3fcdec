"""`deal server register` keeps what a person has set on the server."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.cli.deploy._triggers import _initialize_deployment_triggers
from prefect.client.orchestration import get_client
from prefect.events.actions import DoNothing
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

from flows.server import deploy
from flows.server.automations import NEVER_BEGAN, NEVER_STARTED, automations
from flows.server.deploy import deploy_all, prefect_file
from tasks.arrival_runs import LANDED

pytestmark = pytest.mark.usefixtures("prefect_api")


@pytest.fixture
def deployed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What Prefect is given to deploy; nothing else of a deploy happens."""
    found: dict[str, Any] = {}

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        found.update(yaml.safe_load(Path(command[-1]).read_text(encoding="utf-8")))
        return subprocess.CompletedProcess(command, 0, stdout="", stderr="")

    async def nothing(*_: Any) -> None:
        pass

    monkeypatch.setattr(deploy.subprocess, "run", run)
    for name in ("_apply_pool", "apply_automations", "apply_notifications"):
        monkeypatch.setattr(deploy, name, nothing)
    return found


def test_what_lands_starts_no_run_after_a_deploy_if_a_person_has_paused_that(
    home: Path, deployed: dict[str, Any]
) -> None:
    (home / "logs").mkdir(parents=True, exist_ok=True)
    automation = AutomationCore(
        name=LANDED, trigger=EventTrigger(expect={"x"}, posture=Posture.Reactive, threshold=1), actions=[DoNothing()]
    )

    def is_on() -> bool:
        asyncio.run(deploy_all(home))
        (adapt,) = (each for each in deployed["deployments"] if each["name"] == "adapt")
        (trigger,) = _initialize_deployment_triggers("adapt", adapt["triggers"])
        trigger.set_deployment_id(automation_id)
        return trigger.as_automation().enabled

    async def make() -> Any:
        async with get_client() as client:
            return await client.create_automation(automation)

    async def change(name: str) -> None:
        async with get_client() as client:
            await getattr(client, name)(automation_id)

    automation_id = asyncio.run(make())
    try:
        assert is_on()
        asyncio.run(change("pause_automation"))
        assert not is_on()
    finally:
        asyncio.run(change("delete_automation"))  # the server serves other tests as well
    assert is_on(), "on a new server"
    plain = yaml.safe_load(prefect_file().read_text(encoding="utf-8"))
    for each in deployed["deployments"]:
        for trigger in each.get("triggers", []):
            assert trigger.pop("enabled") is True
    assert deployed == plain


def test_a_run_that_ended_before_it_began_is_not_started_again_without_end() -> None:
    """Prefect counts a start when the run begins: in a broken installation the count stays 0."""
    again = [each for each in automations(NEVER_BEGAN) if each.trigger.expect == {"prefect.flow-run.Crashed"}]
    matches = [each.trigger.match.model_dump() for each in again]
    assert [each["prefect.run-count"] for each in matches] == [["1", "2", "3"], "0"]
    assert matches[1]["prefect.state-message"] == NEVER_STARTED, "what the automation before says"
