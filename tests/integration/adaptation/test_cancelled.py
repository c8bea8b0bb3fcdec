"""A run that a person cancels holds its arrivals until `deal data release`."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect.client.orchestration import get_client
from prefect.states import Cancelled, Cancelling, State
from typer.testing import CliRunner

import tasks.arrival_runs
import tasks.inbox
from deal_core.errors import ConfigError
from flows.announce import watch_inbox
from flows.cli.app import app
from flows.requeue import requeue
from flows.server.status import read_status
from flows.watch import adapt_landed
from tasks.arrival_runs import DEPLOYMENT, release
from tasks.context import current_store
from tasks.inbox import HeldArrival, find_landed, read_state, write_state
from tasks.lineage.settings import WatchedLineage, add_lineage
from tests.in_process import KilledError, put_back

pytestmark = pytest.mark.usefixtures("prefect_api", "home", "deployment")
KEY = "inbox/parcels/a.jsonl"


@pytest.fixture
def deployment() -> Iterator[None]:
    """The deployment whose runs learn what lands, on the tests' Prefect server; nothing starts its runs."""

    async def make() -> object:
        async with get_client() as client:
            flow_id = await client.create_flow(adapt_landed)
            return await client.create_deployment(flow_id, name=DEPLOYMENT, tags=["deal"])

    async def delete() -> None:
        async with get_client() as client:
            await client.delete_deployment(made)  # type: ignore[arg-type]

    made = asyncio.run(make())
    yield
    asyncio.run(delete())


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """An open arrival without a run is announced again at each look."""
    monkeypatch.setattr(tasks.inbox, "PAUSE", timedelta(0))


@pytest.fixture
def lineages() -> None:
    """Two lineages. No row of what lands can be used, so each run ends without a training."""
    for name in ("l", "other"):
        add_lineage(current_store(), WatchedLineage(lineage=name))


def land(home: Path, name: str, content: bytes = b"nonsense\n") -> None:
    path = home / "store" / "inbox" / "parcels" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def look() -> int:
    return asyncio.run(watch_inbox(for_seconds=0, poll_seconds=0.01))


def learn(lineage: str) -> list[str]:
    result = asyncio.run(adapt_landed(lineage, settle_seconds=0.01))
    return [seen.key for seen in result.files]


def announced(home: Path, name: str = "a.jsonl") -> None:
    """An arrival that both lineages know of."""
    land(home, name)
    look()
    assert look() == 2, "settled, and announced to both lineages"


def begun(monkeypatch: pytest.MonkeyPatch, lineage: str) -> None:
    """A run that dies at its first arrival."""

    async def die(*arguments: object) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr("flows.watch._adapt_to", die)
        with pytest.raises(KilledError):
            learn(lineage)


def run_ends(lineage: str, state: State) -> UUID:
    """A run of the deployment for a lineage, in the state that a person gives it."""

    async def act() -> UUID:
        async with get_client() as client:
            found = await client.read_deployment_by_name(f"adapt-landed/{DEPLOYMENT}")
            run = await client.create_flow_run_from_deployment(found.id, parameters={"lineage": lineage})
            await client.set_flow_run_state(run.id, state, force=True)
            return run.id

    return asyncio.run(act())


def then(run: UUID, state: State) -> None:
    """The next state of a run."""

    async def act() -> None:
        async with get_client() as client:
            await client.set_flow_run_state(run, state, force=True)

    asyncio.run(act())


def is_held(lineage: str = "l") -> bool:
    known = read_state(current_store(), lineage).files.get(KEY)
    return known is not None and known.outcome == "held"


def deal(*words: str) -> str:
    with put_back():
        found = CliRunner().invoke(app, words, catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return " ".join(found.output.split())


@pytest.mark.parametrize("state", [Cancelled, Cancelling])
def test_a_cancelled_run_does_not_start_again_until_a_person_asks(home: Path, lineages: None, state: type) -> None:
    announced(home)
    run_ends("l", state())
    assert look() == 1 and is_held() and not is_held("other"), "only the other lineage's run is announced again"
    land(home, "b.jsonl", b"more nonsense\n")
    assert learn("l") == ["inbox/parcels/b.jsonl"], "what lands later is learned"

    (status,) = (each for each in asyncio.run(read_status(home)).lineages if each.lineage == "l")
    assert status.num_open == 0 and [each.key for each in status.held_arrivals] == [KEY]
    remedy = f"deal data release {KEY} --lineage l"
    for shown in (deal("status"), deal("version", "list", "--lineage", "l")):
        assert "was cancelled on" in shown and remedy in shown
    shown = deal("data", "list")
    assert "was cancelled on" in shown and KEY in shown
    assert json.loads(deal(*remedy.split()[1:], "--json"))["released"] == [KEY]
    assert not is_held() and asyncio.run(read_status(home)).lineages[0].num_open == 1
    assert look() >= 1
    assert learn("l") == [KEY], "the run that was cancelled before counts no longer"


def test_a_hold_does_not_need_the_watcher(home: Path, lineages: None, monkeypatch: pytest.MonkeyPatch) -> None:
    land(home, "a.jsonl")
    begun(monkeypatch, "l")
    run_ends("l", Cancelled())
    run_ends("third", Cancelled())  # a newer one, which fills the first page
    monkeypatch.setattr("tasks.arrival_runs._PAGE", 1)
    assert learn("l") == [] and is_held()
    assert learn("other") == [KEY]


def test_a_result_that_is_recorded_while_the_server_is_asked_stays(
    home: Path, lineages: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    announced(home)
    land(home, "b.jsonl", b"more nonsense\n")
    announced(home, "b.jsonl")
    run_ends("l", Cancelled())
    ask = tasks.arrival_runs.cancelled_runs

    async def ask_slowly(lineage: str, since: datetime) -> Any:
        state = read_state(current_store(), lineage)
        info = find_landed(current_store(), KEY)
        assert info is not None
        state.record(info, "refused", "no good row", now=datetime.now(UTC))
        write_state(current_store(), lineage, state)
        return await ask(lineage, since)

    monkeypatch.setattr(tasks.arrival_runs, "cancelled_runs", ask_slowly)
    look()
    found = read_state(current_store(), "l").files
    assert {key: each.outcome for key, each in found.items()} == {KEY: "refused", "inbox/parcels/b.jsonl": "held"}


def test_the_time_of_a_file_says_nothing(home: Path, lineages: None) -> None:
    run_ends("l", Cancelled())
    land(home, "a.jsonl")
    os.utime(home / "store" / KEY, (1_700_000_000, 1_700_000_000))
    assert learn("l") == [KEY], "a copy that kept its time: the cancelled run never saw it"


def test_a_run_counts_from_the_time_at_which_a_person_cancelled_it(home: Path, lineages: None) -> None:
    """Its process may end, or its worker may come back, long after that."""
    announced(home)
    run = run_ends("l", Cancelling())
    assert look() == 1 and is_held()
    release(current_store(), "l", [KEY])
    land(home, "b.jsonl", b"more nonsense\n")
    look()
    assert look() >= 1, "announced, after the cancellation"
    then(run, Cancelled())
    assert learn("l") == [KEY, "inbox/parcels/b.jsonl"]


def test_a_run_does_not_hold_twice_where_the_clocks_differ(home: Path, lineages: None) -> None:
    announced(home)
    run_ends("l", Cancelled())
    assert learn("l") == [] and is_held()
    release(current_store(), "l", [KEY])
    state = read_state(current_store(), "l")
    state.files[KEY].at -= timedelta(hours=1)  # by the clock of this machine, before the server's cancellation
    write_state(current_store(), "l", state)
    assert learn("l") == [KEY]


def test_an_arrival_that_goes_on_is_announced_at_once(
    home: Path, lineages: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server ignores an event whose id it has had."""
    ids: list[UUID] = []
    emit = tasks.arrival_runs.emit_event

    def note(**event: Any) -> object:
        if event["payload"]["lineage"] == "l":
            ids.append(event["id"])
        return emit(**event)

    monkeypatch.setattr("tasks.arrival_runs.emit_event", note)
    monkeypatch.setattr(tasks.inbox, "PAUSE", timedelta(hours=1))
    land(home, "a.jsonl")
    assert look() + look() == 2
    run_ends("l", Cancelled())
    assert look() == 0 and is_held() and len(ids) == 1
    release(current_store(), "l", [KEY])
    assert look() + look() == 1 and len(set(ids)) == 2


def test_a_hold_hides_no_lost_registry(home: Path, lineages: None) -> None:
    announced(home)
    run_ends("l", Cancelled())
    assert learn("l") == [] and is_held()
    assert KEY in deal("version", "list", "--lineage", "l"), "without any version"
    current_store().put_bytes("promotions/l/00000001.json", b'{"version": "1"}')
    for words in (["version", "list"], ["data", "list"]):
        with put_back():
            found = CliRunner().invoke(app, [*words, "--lineage", "l"])
        assert found.exit_code != 0 and KEY not in found.output


def test_the_remedy_is_a_command_for_a_shell() -> None:
    held = HeldArrival(key="inbox/parcels/may 2.jsonl", task="parcels", why="x")
    assert shlex.split(held.line("l").partition("Let it go on with: ")[2]) == [
        "deal",
        "data",
        "release",
        held.key,
        "--lineage",
        "l",
    ]


def test_what_was_cancelled_before_an_arrival_landed_does_not_hold_it(home: Path, lineages: None) -> None:
    run_ends("l", Cancelled())
    land(home, "a.jsonl")
    assert learn("l") == [KEY]


def test_another_content_is_another_arrival(home: Path, lineages: None) -> None:
    announced(home)
    run_ends("l", Cancelled())
    assert learn("l") == []
    land(home, "a.jsonl", b"other nonsense\n")
    assert learn("l") == [KEY]


def test_the_deployment_lets_everything_go_on_that_is_held(home: Path, lineages: None) -> None:
    announced(home)
    run_ends("l", Cancelled())
    assert learn("l") == [] and is_held()
    assert asyncio.run(requeue("l")) == []
    assert learn("l") == [KEY]


def test_only_what_is_held_can_go_on(home: Path, lineages: None) -> None:
    land(home, "a.jsonl")
    with pytest.raises(ConfigError, match=rf"{KEY} is not held for lineage 'l'; none is held"):
        release(current_store(), "l", [KEY])
