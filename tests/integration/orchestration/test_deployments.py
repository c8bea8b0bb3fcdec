"""The deployments on a Prefect server: their forms, the link of a notice, and whose home they work in."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit
from uuid import UUID

import pytest
from prefect.client.orchestration import get_client
from prefect.exceptions import ParameterTypeError, PrefectHTTPStatusError
from prefect.states import Scheduled

from deal_core.errors import ConfigError, RegistryError
from deal_pipeline.server.deploy import _require_own, deploy_all
from deal_pipeline.server.status import NEWEST, ServerRuns, read_server
from flows.promote import decide, reject
from infra.promotions import Move, PromotionLog
from infra.store.opening import open_store
from infra.versions import Versions
from tasks.adaptation.promote import promote_accepted
from tasks.notices import Notice, announce
from tests.in_process import deal
from tests.receiver import Receiver
from tests.registering import register

pytestmark = pytest.mark.usefixtures("prefect_api", "home")
BY = {"why": "read the report", "who": "Ada"}


def start(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """Ask the server for a run, as its page does with a form."""

    async def ask() -> dict[str, Any]:
        async with get_client() as client:
            found = await client.read_deployment_by_name(name)
            return (await client.create_flow_run_from_deployment(found.id, parameters=parameters)).parameters

    return asyncio.run(ask())


def schedules_of(name: str) -> list[dict[str, Any]]:
    """The parameters of a deployment's schedules that are on."""

    async def read() -> list[dict[str, Any]]:
        async with get_client() as client:
            found = await client.read_deployment_by_name(name)
            return [each.parameters for each in found.schedules if each.active]

    return asyncio.run(read())


@pytest.mark.nightly
@pytest.mark.usefixtures("deployed")
def test_what_stands_on_the_server(receiver: Receiver) -> None:
    """One test, as the deploy that its steps share takes long."""
    check_the_forms_take_what_the_flows_take()
    check_a_late_run_is_shown_among_many_of_a_later_time()
    check_the_notice_of_a_version_that_waits_leads_to_the_form(receiver)


def check_the_forms_take_what_the_flows_take() -> None:
    decided = {"lineage": "l", "version": "3", "verdict": "approve", **BY}
    accepted: dict[str, dict[str, Any]] = {
        "decide/decide": decided,
        "reject/reject": {"lineage": "l", "version": "3", "why": "labels look wrong"},
        "requeue/requeue": {"lineage": "l", "arrivals": ["inbox/parcels/a.jsonl"]},
        "gc/gc": {"older_than": "14d"},
        "forget/forget": {"named": "inbox/parcels/a.jsonl", "reason": "request 1873"},
    }
    for name, parameters in accepted.items():
        assert start(name, parameters).items() >= parameters.items()
    assert start("gc/gc", {})["dry_run"] is True, "a run that is started blindly removes nothing"
    assert schedules_of("gc/gc") == [{"dry_run": False}], "the nightly run removes"
    refused: list[tuple[str, dict[str, Any]]] = [
        ("decide/decide", {**decided, "verdict": "perhaps"}),
        ("decide/decide", {**decided, "why": ""}),
        ("decide/decide", {key: decided[key] for key in decided if key != "who"}),
        ("reject/reject", {"lineage": "l", "version": "3"}),
        ("forget/forget", {}),
    ]
    for name, parameters in refused:
        with pytest.raises(PrefectHTTPStatusError, match=r"409|422"):
            start(name, parameters)


def check_a_late_run_is_shown_among_many_of_a_later_time() -> None:
    now, problems = datetime.now(UTC), []

    async def read() -> ServerRuns:
        async with get_client() as client:
            found = await client.read_deployment_by_name("gc/gc")
            for minutes in (-5, *range(60, 60 + NEWEST)):
                due = Scheduled(scheduled_time=now + timedelta(minutes=minutes))
                await client.create_flow_run_from_deployment(found.id, state=due, name=f"due-{minutes}")
        return await read_server(problems)

    names = [run.name for run in asyncio.run(read()).waiting]
    assert "due--5" in names and not {name for name in names if name.startswith("due-6")} and not problems


def check_the_notice_of_a_version_that_waits_leads_to_the_form(receiver: Receiver) -> None:
    for kind in ("awaiting approval", "promoted"):
        announce(kind, Notice(lineage="l", version="3"))  # type: ignore[arg-type]
    waits, promoted = (notice["payload"]["decide_url"] for notice in receiver.told())
    assert promoted is None
    parts = urlsplit(waits)
    *_, deployment, page = parts.path.split("/")
    assert page == "run" and json.loads(parse_qs(parts.query)["parameters"][0]) == {"lineage": "l", "version": "3"}

    async def name_of() -> str:
        async with get_client() as client:
            return (await client.read_deployment(UUID(deployment))).name

    assert asyncio.run(name_of()) == "decide"


def home_on_the_server() -> str:
    async def read() -> Any:
        async with get_client() as client:
            return (await client.read_deployment_by_name("adapt-landed/adapt")).pull_steps

    ((step,),) = (each.values() for each in asyncio.run(read()))
    return str(step["directory"])


@pytest.mark.nightly
def test_another_home_or_store_is_not_overwritten(
    deployed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (other := tmp_path / "other").mkdir()
    said = deal("server", "register", "--home", str(other), code=2)
    assert "deal server register --replace" in " ".join(said.split())
    assert home_on_the_server() == str(deployed)

    async def require_own() -> None:
        async with get_client() as client:
            await _require_own(client, {"home": str(deployed), "store": open_store().uri})

    asyncio.run(require_own())  # its own home may deploy again, which another deploy would show too, but not as fast
    with monkeypatch.context() as patch:
        patch.setenv("DEAL_STORE_URI", f"file://{tmp_path}/elsewhere")
        with pytest.raises(ConfigError, match=r"the store is .*home/store, here it is .*elsewhere"):
            asyncio.run(deploy_all(deployed))
    assert home_on_the_server() == str(deployed)


@pytest.mark.nightly
@pytest.mark.usefixtures("deployed")
def test_another_home_takes_the_place_when_asked_and_starts_nothing_that_was_stopped(tmp_path: Path) -> None:
    (other := tmp_path / "other").mkdir()
    (other / "logs").mkdir()

    async def stopped(pauses: bool) -> tuple[bool, bool]:
        """Whether the deployment gc is paused and the automation for silent runs is off; first stop both."""
        async with get_client() as client:
            found = await client.read_deployment_by_name("gc/gc")
            (silent,) = await client.read_automations_by_name("deal: silent runs")
            if pauses:
                await client.pause_deployment(found.id)
                await client.pause_automation(silent.id)
            return found.paused, not silent.enabled

    assert asyncio.run(stopped(pauses=True)) == (False, False)
    asyncio.run(deploy_all(other, replace=True))
    assert home_on_the_server() == str(other)
    assert asyncio.run(stopped(pauses=False)) == (True, True), "a deploy starts nothing that a person has stopped"


@pytest.fixture
def waiting(copied_home: Path) -> str:
    """Number of a version that waits for a person."""
    found = register("waiting", needs_approval=True)
    promote_accepted(open_store(), found)
    return found.version


def last_move() -> Move:
    return PromotionLog(open_store()).moves("l")[-1]


def test_a_person_decides_by_the_form(waiting: str) -> None:
    before = len(PromotionLog(open_store()).moves("l"))
    for wrong in ({**BY, "why": "  "}, {**BY, "who": ""}):
        with pytest.raises(ParameterTypeError):
            asyncio.run(decide("l", waiting, "approve", **wrong))
    assert len(PromotionLog(open_store()).moves("l")) == before
    asyncio.run(decide("l", waiting, "approve", **BY))
    champion = Versions(open_store()).champion("l")
    assert champion is not None and champion.version == waiting
    assert (last_move().action, last_move().who, last_move().why) == ("promoted", "Ada", "read the report")
    with pytest.raises(RegistryError, match="does not wait for a person: it was approved"):
        asyncio.run(decide("l", waiting, "reject", **BY))


def test_a_person_rejects_by_the_form(waiting: str) -> None:
    asyncio.run(decide("l", waiting, "reject", **BY))
    assert (last_move().action, last_move().who, last_move().why) == ("rejected", "Ada", "read the report")
    with pytest.raises(RegistryError, match="it was rejected"):
        asyncio.run(decide("l", waiting, "approve", **BY))
    with pytest.raises(RegistryError, match="is rejected already, by Ada: read the report"):
        asyncio.run(reject("l", waiting, why="again"))
