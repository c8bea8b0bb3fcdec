"""The announcements of the inbox to a server: once per open arrival and lineage, and again after its run was lost."""

from __future__ import annotations

import asyncio
import os
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import tenacity
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterDeploymentId

import tasks.inbox
from benchmarks.tiny_base import EXAMPLES, NO_LIMITS
from deal_core.errors import ConfigError
from flows.announce import announce_open, watch_inbox
from flows.lock import LineageBusyError, is_locked_on_server, lock_lineage
from flows.watch import InboxWorker, adapt_landed
from infra.store.local import FileStore
from infra.versions import Versions
from tasks.arrival_runs import ARRIVAL_LANDED, Announcement, announce_again, read_announcements
from tasks.context import current_store
from tasks.inbox import InboxState, list_arrivals, read_state, write_state
from tasks.inbox import look as look_at_inbox
from tasks.lineage.settings import WatchedLineage, add_lineage, hold_lineage_file, list_lineages, read_lineage
from tasks.spec import parse

ROWS = (EXAMPLES / "parcels" / "messages.jsonl").read_bytes()

pytestmark = pytest.mark.usefixtures("prefect_api", "home", "without_mlflow")


def land(home: Path, name: str, content: bytes = ROWS, age: int = 100) -> None:
    path = home / "store" / "inbox" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    stamp = 1_700_000_000 - age
    os.utime(path, (stamp, stamp))


def lineage(name: str, **settings: Any) -> WatchedLineage:
    return parse(WatchedLineage, {"lineage": name, **settings}, "test")


def look() -> int:
    """The announcements after one read of the inbox."""
    return asyncio.run(watch_inbox(for_seconds=0))


def numbers() -> list[int]:
    """The number of earlier announcements of each arrival, for all lineages."""
    return sorted(each.number for each in announced())


def announced() -> list[Announcement]:
    store = current_store()
    return [Announcement.model_validate_json(store.get_bytes(info.key)) for info in store.list("landed")]


def test_an_arrival_is_announced_once_and_a_changed_one_again(home: Path) -> None:
    land(home, "parcels/a.jsonl")
    assert (look(), look()) == (1, 0)
    land(home, "parcels/a.jsonl", ROWS + b"\n")
    assert (look(), look()) == (1, 0)


def test_what_was_handled_is_not_announced(home: Path) -> None:
    land(home, "parcels/a.jsonl")
    state = InboxState()
    (info,) = list_arrivals(current_store().list("inbox"))
    state.record(info, "promoted", "", now=info.modified)
    write_state(current_store(), "default", state)
    assert look() == 0


def test_a_file_that_may_still_be_written_waits_for_the_next_look(home: Path) -> None:
    land(home, "parcels/a.jsonl")
    os.utime(home / "store" / "inbox" / "parcels" / "a.jsonl")
    seen: dict[str, str] = {}
    store = current_store()
    inbox = look_at_inbox(store)
    looks = [asyncio.run(announce_open(store, inbox, lineage("default"), InboxState(), seen, 60)) for _ in range(2)]
    assert looks == [(0, 1), (1, 0)], "the second read found the same"


def test_each_lineage_is_told_of_its_tasks(home: Path) -> None:
    add_lineage(current_store(), lineage("all"))
    add_lineage(current_store(), lineage("some", tasks=["clinic"]))
    land(home, "parcels/a.jsonl")
    land(home, "clinic/a.csv")
    assert look() == 3
    assert told_lineages() == {"all", "some"}


def told_lineages() -> set[str]:
    return {info.key.split("/")[1] for info in current_store().list("landed")}


def test_a_run_does_not_wait_for_a_folder_that_may_be_written_for_long(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would keep a worker. The folder is announced when it is complete."""
    add_lineage(current_store(), lineage("l", tasks=["parcels"]))
    land(home, "parcels/may/a.jsonl")
    assert look() == 0
    run = asyncio.wait_for(adapt_landed("l", settle_seconds=0.1), timeout=120)
    assert asyncio.run(run).files == ()
    monkeypatch.setenv("DEAL_INBOX_SETTLE_SECONDS", "0")
    assert look() == 1 and told_lineages() == {"l"}


def test_a_held_lineage_is_told_of_nothing_until_it_may_learn_again(home: Path) -> None:
    for name in ("held", "other"):
        add_lineage(current_store(), lineage(name, tasks=["parcels"]))
    hold_lineage_file(current_store(), "held", "the labels are being corrected")
    land(home, "parcels/a.jsonl")
    assert look() == 1 and told_lineages() == {"other"}
    assert asyncio.run(adapt_landed("held", settle_seconds=0.1)).files == ()
    hold_lineage_file(current_store(), "held", None)
    assert look() == 1 and told_lineages() == {"held", "other"}
    assert read_lineage(current_store(), "held").tasks == ("parcels",), "the other settings stay"


def test_a_hold_stops_the_files_that_a_run_has_not_begun(tiny_base: Path, home: Path) -> None:
    """The file that is being learned is finished."""
    store = current_store()
    train = {"max_steps": 1, "max_prompt_tokens": 192, "checkpoint_steps": 0}
    add_lineage(store, lineage("l", base_model=str(tiny_base), train=train, gate=NO_LIMITS))
    for name, rows in (("a", ROWS), ("b", ROWS + ROWS.splitlines(keepends=True)[0].replace(b"my", b"our"))):
        land(home, f"parcels/{name}.jsonl", rows)
    worker = InboxWorker(store, read_lineage(store, "l"), settle_seconds=0, once=False, wait=True)
    handle = worker._handle

    async def handle_and_hold(*arguments: Any) -> bool:
        is_done = await handle(*arguments)
        hold_lineage_file(store, "l", "enough")
        return is_done

    worker._handle = handle_and_hold  # type: ignore[method-assign]
    asyncio.run(worker.handle_open())
    assert [seen.key for seen in worker.files] == ["inbox/parcels/a.jsonl"] and worker.num_left == 1
    assert worker.runs == [], "a watch that goes on keeps no result of each run, which has an accuracy matrix"


def test_a_look_lists_the_inbox_once_for_all_lineages(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_lineage(current_store(), lineage("one"))
    add_lineage(current_store(), lineage("two"))
    land(home, "parcels/a.jsonl")
    listed: list[str] = []
    original = FileStore.list
    monkeypatch.setattr(FileStore, "list", lambda self, prefix="": listed.append(prefix) or original(self, prefix))
    assert look() == 2
    assert listed.count("inbox") == 1


def test_a_task_file_is_read_again_when_it_has_changed_and_not_before(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    land(home, "bank/task.yaml", b"test_data: old.jsonl\n")
    for name in ("old", "new"):
        land(home, f"bank/{name}.jsonl")
    land(home, "parcels/task.yaml", b"instruction: Which?\n")
    read: list[str] = []
    original = FileStore.get_bytes
    monkeypatch.setattr(
        FileStore, "get_bytes", lambda self, key, **limit: read.append(key) or original(self, key, **limit)
    )
    store = current_store()
    read.clear()  # the store's format
    for _ in range(2):
        assert [info.key for info in look_at_inbox(store).arrivals] == ["inbox/bank/new.jsonl"]
    assert sorted(read) == ["inbox/bank/task.yaml", "inbox/parcels/task.yaml"]
    land(home, "bank/task.yaml", b"test_data: new.jsonl\n", age=50)
    assert [info.key for info in look_at_inbox(store).arrivals] == ["inbox/bank/old.jsonl"]
    assert len(read) == 3


def test_what_is_noted_of_an_arrival_goes_when_it_is_closed_or_gone(home: Path, tmp_path: Path) -> None:
    add_lineage(current_store(), lineage("l", base_model=str(tmp_path / "away")))
    land(home, "parcels/a.jsonl")
    land(home, "bank/bad.jsonl", b"nonsense\n")
    assert look() == 2
    result = asyncio.run(adapt_landed("l", settle_seconds=0.01))
    assert sorted(seen.outcome for seen in result.files) == ["failed", "refused"]
    assert [told.key for told in announced()] == ["inbox/parcels/a.jsonl"]
    (home / "store" / "inbox" / "bank" / "bad.jsonl").unlink()
    land(home, "bank/worse.jsonl", b"more nonsense\n")
    asyncio.run(adapt_landed("l", settle_seconds=0.01))
    assert sorted(read_state(current_store(), "l").files) == ["inbox/bank/worse.jsonl", "inbox/parcels/a.jsonl"]


def test_a_lost_run_is_noticed_unless_the_lineage_is_at_work(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_lineage(current_store(), lineage("lost"))
    land(home, "parcels/a.jsonl")
    land(home, "parcels/b.jsonl")
    assert look() == 2
    monkeypatch.setattr(tasks.inbox, "PAUSE", timedelta(0))

    async def look_while_held() -> int:
        async with lock_lineage("lost"):
            assert await is_locked_on_server("lost")
            inbox = look_at_inbox(current_store())
            return (await announce_open(current_store(), inbox, lineage("lost"), InboxState(), {}, 0)).num_announced

    assert asyncio.run(look_while_held()) == 0, "the run that holds the lineage reads the inbox again before it ends"
    assert look() == 1, "one run takes all open arrivals"
    assert numbers() == [0, 1]


def test_a_lineage_that_waits_for_a_worker_is_announced_ever_more_seldom(home: Path) -> None:
    land(home, "parcels/a.jsonl")
    assert look() == 1
    (info,) = list_arrivals(current_store().list("inbox"))
    minutes, at = [], datetime.now(UTC)
    for minute in range(200):
        last = read_announcements(current_store(), "default", [info])[info.key]
        if announce_again(current_store(), "default", info, last, at + timedelta(minutes=minute, seconds=5)):
            minutes.append(minute)
            noted = read_announcements(current_store(), "default", [info])[info.key]
            moved = noted.model_copy(update={"at": at + timedelta(minutes=minute)})
            (key,) = (entry.key for entry in current_store().list("landed"))
            current_store().put_bytes(key, moved.model_dump_json().encode())
    assert minutes == [1, 3, 7, 15, 31, 63, 127, 191]
    last = read_announcements(current_store(), "default", [info])[info.key]
    assert announce_again(current_store(), "default", info, last, at - timedelta(days=1)), "the clock was set back"


def test_what_is_wrong_with_one_lineage_holds_up_no_other(home: Path) -> None:
    add_lineage(current_store(), lineage("damaged"))
    add_lineage(current_store(), lineage("whole"))
    current_store().put_bytes("watch/damaged.json", b"nonsense")
    land(home, "parcels/a.jsonl")
    assert look() == 1
    assert {info.key.split("/")[1] for info in current_store().list("landed")} == {"whole"}


def test_a_broken_lineage_file_holds_up_no_other(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = current_store()
    add_lineage(store, lineage("good"))
    for name, content in (("typo", b"strategi: deal\n"), ("other", b"lineage: good\n"), ("text", b"\xff\n")):
        store.put_bytes(f"lineages/{name}.yaml", content)
    assert [each.lineage for each in list_lineages(store)] == ["good"]
    assert "unknown key 'strategi'" in caplog.text and "is about lineage 'good'" in caplog.text


def test_a_lineage_file_says_only_what_was_given(home: Path) -> None:
    given = lineage("short", tasks=["bank"], strategy="seq_lora")
    add_lineage(current_store(), given)
    stored = yaml.safe_load(current_store().get_bytes("lineages/short.yaml"))
    assert stored == {"lineage": "short", "tasks": ["bank"], "strategy": "seq_lora"}
    assert read_lineage(current_store(), "short") == given
    with pytest.raises(ConfigError, match="deal lineage apply"):
        read_lineage(current_store(), "nobody")


def small(name: str, base: Path) -> WatchedLineage:
    return lineage(
        name,
        base_model=str(base),
        gate=NO_LIMITS,
        train={"max_steps": 2, "max_prompt_tokens": 192, "checkpoint_steps": 0},
    )


def test_a_run_takes_all_that_is_open_and_what_lands_meanwhile(home: Path, tiny_base: Path) -> None:
    add_lineage(current_store(), small("l", tiny_base))
    rows = ROWS.splitlines(keepends=True)
    land(home, "parcels/2.jsonl", b"".join(rows[:20]), age=50)
    land(home, "parcels/1.jsonl", b"".join(rows[20:40]), age=100)
    result = asyncio.run(adapt_landed("l", settle_seconds=0.01))
    assert [seen.key for seen in result.files] == ["inbox/parcels/1.jsonl", "inbox/parcels/2.jsonl"]
    assert [version.parent_version for version in Versions(current_store()).all("l")] == [None, "1"]
    assert asyncio.run(adapt_landed("l")).files == ()


def test_a_run_that_finds_its_lineage_at_work_ends_at_once(home: Path, tiny_base: Path) -> None:
    add_lineage(current_store(), small("busy", tiny_base))
    land(home, "parcels/a.jsonl")

    async def two() -> Any:
        async with lock_lineage("busy"):
            with pytest.raises(LineageBusyError):
                async with lock_lineage("busy", wait=False):
                    pass
            return await adapt_landed("busy", settle_seconds=0.01)

    assert asyncio.run(two()).files == ()
    assert Versions(current_store()).all("busy") == ()


def test_what_another_run_did_while_this_one_waited_is_not_done_again(home: Path, tiny_base: Path) -> None:
    land(home, "parcels/a.jsonl")
    spec = small("shared", tiny_base)
    worker = InboxWorker(current_store(), spec, settle_seconds=0.01, once=False, wait=True)

    async def two() -> None:
        async with lock_lineage("shared"):
            waiting = asyncio.create_task(worker.handle_open())
            await asyncio.sleep(0)  # the flow has read the inbox, and waits
            (info,) = list_arrivals(current_store().list("inbox"))
            state = InboxState()
            state.record(info, "promoted", "", now=info.modified)
            write_state(current_store(), "shared", state)
        await waiting

    asyncio.run(two())
    assert worker.files == [] and Versions(current_store()).all("shared") == ()


def test_the_server_carries_the_automations_once() -> None:
    from flows.server.automations import PROCESS_NEVER_BEGAN, apply_automations, automations

    async def twice() -> list[str]:
        async with get_client() as client:
            await apply_automations(client, PROCESS_NEVER_BEGAN)
            await apply_automations(client, PROCESS_NEVER_BEGAN)
            return sorted(each.name for each in await client.read_automations())

    assert asyncio.run(twice()) == sorted(each.name for each in automations(PROCESS_NEVER_BEGAN))


@pytest.mark.nightly
@pytest.mark.usefixtures("deployed")
def test_an_event_of_others_starts_a_run_with_or_without_a_payload() -> None:
    payloads: dict[str, dict[str, str]] = {"bare": {}, "said": {"lineage": "said"}}
    events = [
        {
            "event": ARRIVAL_LANDED,
            "occurred": datetime.now(UTC).isoformat(),
            "id": str(uuid.uuid4()),
            "resource": {"prefect.resource.id": f"deal.lineage.{name}"},
            "payload": payload,
        }
        for name, payload in payloads.items()
    ]

    async def started() -> list[dict[str, Any]]:
        async with get_client() as client:
            adapt = await client.read_deployment_by_name("adapt-landed/adapt")
            wanted = FlowRunFilter(deployment_id=FlowRunFilterDeploymentId(any_=[adapt.id]))
            await client.request("POST", "/events", json=events)
            async for attempt in tenacity.AsyncRetrying(
                wait=tenacity.wait_fixed(0.2), stop=tenacity.stop_after_delay(180), reraise=True
            ):
                with attempt:
                    runs = await client.read_flow_runs(flow_run_filter=wanted)
                    assert len(runs) == len(events)
            return sorted((run.parameters for run in runs), key=str)

    assert asyncio.run(started()) == [{"lineage": "bare"}, {"lineage": "said"}]
