"""The sweep: a run that a person cancels holds its arrivals until a release, and a lost run is started again."""

from __future__ import annotations

import asyncio
import shlex
from pathlib import Path
from uuid import UUID

import pytest
from prefect.client.orchestration import get_client
from prefect.states import Cancelled, Cancelling, Completed, Crashed, Failed, State

from deal_core.errors import ConfigError
from deal_pipeline.server.status import read_status
from flows.lock import lock_lineage
from flows.requeue import requeue
from flows.sensor import watch_inbox
from flows.watch import adapt_landed
from infra.lineage_state import Batch, read_ended, read_state
from infra.store.opening import open_store
from tasks.arrivals import HeldArrival, release
from tasks.lineage.settings import WatchedLineage, add_lineage
from tests import arriving
from tests.in_process import deal

pytestmark = pytest.mark.usefixtures("prefect_api", "home", "adapt_deployment", "lineages")
KEY, OTHER = "inbox/parcels/a.jsonl", "inbox/parcels/b.jsonl"


@pytest.fixture
def lineages(home: Path) -> None:
    """Two lineages. No row of what lands can be used, so each run ends without a training."""
    for name in ("l", "other"):
        add_lineage(open_store(), WatchedLineage(lineage=name))


def land(home: Path, name: str = "a.jsonl", content: bytes = b"nonsense\n") -> None:
    arriving.land(home, f"parcels/{name}", content)


def look() -> int:
    """The runs that one look of the sensor starts."""
    return asyncio.run(watch_inbox(for_seconds=0, poll_seconds=0.01))


def learn(lineage: str) -> list[str]:
    result = asyncio.run(adapt_landed(lineage, settle_seconds=0.01))
    return [seen.key for seen in result.files]


def claimed(lineage: str = "l") -> Batch:
    batch = read_state(open_store(), lineage).claimed
    assert batch is not None and batch.run is not None
    return batch


def run_becomes(state: State, lineage: str = "l") -> UUID:
    """Give the run of the claimed batch another state."""
    run = UUID(claimed(lineage).run)

    async def act() -> None:
        async with get_client() as client:
            await client.set_flow_run_state(run, state, force=True)

    asyncio.run(act())
    return run


def states(lineage: str = "l") -> dict[str, str]:
    return {key: note.state for key, note in read_state(open_store(), lineage).arrivals.items()}


@pytest.mark.parametrize("state", [Cancelled, Cancelling])
def test_a_cancelled_run_does_not_start_again_until_a_person_asks(home: Path, state: type) -> None:
    land(home)
    assert look() == 2, "one run for each lineage"
    run_becomes(state())
    land(home, "b.jsonl", b"more nonsense\n")
    assert look() == 1 and states() == {KEY: "held", OTHER: "claimed"}, "what lands later is learned"
    assert states("other")[KEY] == "claimed"
    assert learn("l") == [OTHER]

    (status,) = (each for each in asyncio.run(read_status(home)).lineages if each.lineage == "l")
    assert status.num_open == 0 and [each.key for each in status.held_arrivals] == [KEY]
    assert release(open_store(), "l", [KEY]) == (KEY,)
    assert asyncio.run(read_status(home)).lineages[0].num_open == 1
    assert look() == 1 and states() == {KEY: "claimed"}, "the run that was cancelled before counts no longer"
    assert learn("l") == [KEY]


def test_a_cancelled_run_holds_what_it_had_still_to_learn(home: Path) -> None:
    land(home)
    land(home, "b.jsonl", b"more nonsense\n")
    look()
    assert states() == {KEY: "claimed", OTHER: "waiting"}
    run_becomes(Cancelled())
    assert look() == 0 and states() == {KEY: "held", OTHER: "held"}
    assert asyncio.run(requeue("l")) == [] and set(states().values()) == {"waiting"}


@pytest.mark.parametrize("state", [Crashed, Failed, Completed])
def test_a_run_that_is_over_and_has_not_ended_its_batch_is_followed_by_another(home: Path, state: type) -> None:
    land(home)
    look()
    first = claimed()
    run_becomes(state())
    assert look() == 1
    second = claimed()
    assert (second.id, second.attempt) == (first.id, 2) and second.run != first.run
    assert learn("l") == [KEY] and look() == 0, "and it is learned once"


def test_a_run_that_the_server_has_lost_is_followed_by_another(home: Path) -> None:
    land(home)
    look()

    async def delete() -> None:
        async with get_client() as client:
            await client.delete_flow_run(UUID(claimed().run))

    asyncio.run(delete())
    assert look() == 1 and claimed().attempt == 2


def test_a_sensor_that_dies_after_it_has_started_a_run_starts_no_second_one(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    land(home)
    with monkeypatch.context() as patch:
        patch.setattr("flows.sensor.with_run", lambda state, **_: state)
        look()
    batch = read_state(open_store(), "l").claimed
    assert batch is not None and batch.run is None
    look()
    assert claimed().attempt == 1

    async def runs() -> int:
        async with get_client() as client:
            found = await client.read_flow_runs()
            return sum(run.idempotency_key == f"{batch.id}:1" for run in found)

    assert asyncio.run(runs()) == 1


def test_a_lineage_at_work_is_not_started_and_a_run_that_finds_it_at_work_leaves_its_place(home: Path) -> None:
    land(home)

    async def look_while_held() -> int:
        async with lock_lineage("l"):
            return await watch_inbox(for_seconds=0, poll_seconds=0.01)

    assert asyncio.run(look_while_held()) == 1 and states() == {KEY: "waiting"}, "the other lineage's run"
    look()
    batch = claimed()

    async def run_while_held() -> None:
        async with lock_lineage("l"):
            await adapt_landed("l", settle_seconds=0.01)

    asyncio.run(run_while_held())
    assert claimed() == batch, "the batch is of another run"
    run_becomes(Completed())
    assert look() == 1


def test_another_content_is_another_arrival(home: Path) -> None:
    land(home)
    look()
    run_becomes(Cancelled())
    assert learn("l") == [KEY], "only the sensor holds"
    land(home, content=b"other nonsense\n")
    look()
    run_becomes(Cancelled())
    look()
    assert states() == {KEY: "held"} and learn("l") == []
    land(home, content=b"again other nonsense\n")
    assert learn("l") == [KEY] and read_ended(open_store(), "l")[KEY].outcome == "refused"


def test_a_hold_hides_no_lost_registry(home: Path) -> None:
    land(home)
    look()
    run_becomes(Cancelled())
    look()
    assert KEY in deal("version", "list", "--lineage", "l"), "without any version"
    open_store().put_bytes("promotions/l/00000001.json", b'{"version": "1"}')
    assert KEY not in deal("version", "list", "--lineage", "l", code=1)


def test_the_remedy_is_a_command_for_a_shell() -> None:
    held = HeldArrival(key="inbox/parcels/may 2.jsonl", task="parcels", why="x")
    command = shlex.split(held.line("l").partition("Let it go on with: ")[2])
    assert command == ["deal", "data", "release", held.key, "--lineage", "l"]


def test_only_what_is_held_can_go_on(home: Path) -> None:
    land(home)
    with pytest.raises(ConfigError) as refused:
        release(open_store(), "l", [KEY])
    assert refused.value.code == "not-held"
