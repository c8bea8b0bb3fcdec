"""The sensor on a server: a run for each lineage that has something to learn. test_cancelled.py is about the sweep."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client

import flows.watch
from benchmarks.tiny_base import EXAMPLES, NO_LIMITS
from flows.sensor import watch_inbox
from flows.watch import adapt_landed
from infra.lineage_state import lineages_with_state, read_state
from infra.store.local import FileStore
from infra.store.opening import open_store
from tasks.inbox import look as look_at_inbox
from tasks.lineage.settings import WatchedLineage, add_lineage, list_lineages, pause_lineage, read_lineage
from tasks.spec import parse
from tests.arriving import land

ROWS = (EXAMPLES / "parcels" / "messages.jsonl").read_bytes()

pytestmark = pytest.mark.usefixtures("prefect_api", "home", "without_mlflow", "adapt_deployment")


def lineage(name: str, **settings: Any) -> WatchedLineage:
    return parse(WatchedLineage, {"lineage": name, **settings}, "test")


def look() -> int:
    """The runs that one look of the sensor starts."""
    return asyncio.run(watch_inbox(for_seconds=0))


def test_each_lineage_is_told_of_its_tasks(home: Path) -> None:
    add_lineage(open_store(), lineage("all"))
    add_lineage(open_store(), lineage("some", tasks=["clinic"]))
    land(home, "parcels/a.jsonl", ROWS)
    land(home, "clinic/a.csv", ROWS)
    assert look() == 2
    assert {name: sorted(read_state(open_store(), name).arrivals) for name in ("all", "some")} == {
        "all": ["inbox/clinic/a.csv", "inbox/parcels/a.jsonl"],
        "some": ["inbox/clinic/a.csv"],
    }


def told_lineages() -> set[str]:
    """The lineages with a claimed batch."""
    store = open_store()
    return {name for name in lineages_with_state(store) if read_state(store, name).claimed is not None}


def test_a_run_does_not_wait_for_a_folder_that_may_be_written_for_long(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would keep a worker. The folder is announced when it is complete."""
    add_lineage(open_store(), lineage("l", tasks=["parcels"]))
    land(home, "parcels/may/a.jsonl", ROWS)
    assert look() == 0
    run = asyncio.wait_for(adapt_landed("l", settle_seconds=0.1), timeout=120)
    assert asyncio.run(run).files == ()
    monkeypatch.setenv("DEAL_INBOX_SETTLE_SECONDS", "0")
    assert look() == 1 and told_lineages() == {"l"}


def test_a_held_lineage_is_told_of_nothing_until_it_may_learn_again(home: Path) -> None:
    for name in ("held", "other"):
        add_lineage(open_store(), lineage(name, tasks=["parcels"]))
    pause_lineage(open_store(), "held", "the labels are being corrected")
    land(home, "parcels/a.jsonl", ROWS)
    assert look() == 1 and told_lineages() == {"other"}
    assert asyncio.run(adapt_landed("held", settle_seconds=0.1)).files == ()
    pause_lineage(open_store(), "held", None)
    assert look() == 1 and told_lineages() == {"held", "other"}
    assert read_lineage(open_store(), "held").tasks == ("parcels",), "the other settings stay"


def test_a_look_lists_the_inbox_once_for_all_lineages(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_lineage(open_store(), lineage("one"))
    add_lineage(open_store(), lineage("two"))
    land(home, "parcels/a.jsonl", ROWS)
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
        land(home, f"bank/{name}.jsonl", ROWS)
    land(home, "parcels/task.yaml", b"instruction: Which?\n")
    read: list[str] = []
    original = FileStore.get_bytes
    monkeypatch.setattr(
        FileStore, "get_bytes", lambda self, key, **limit: read.append(key) or original(self, key, **limit)
    )
    store = open_store()
    read.clear()  # the store's format
    for _ in range(2):
        assert [info.key for info in look_at_inbox(store).arrivals] == ["inbox/bank/new.jsonl"]
    assert sorted(read) == ["inbox/bank/task.yaml", "inbox/parcels/task.yaml"]
    land(home, "bank/task.yaml", b"test_data: new.jsonl\n", age=50)
    assert [info.key for info in look_at_inbox(store).arrivals] == ["inbox/bank/old.jsonl"]
    assert len(read) == 3


def test_what_is_wrong_with_one_lineage_holds_up_no_other(home: Path) -> None:
    add_lineage(open_store(), lineage("damaged"))
    add_lineage(open_store(), lineage("whole"))
    open_store().put_bytes("lineages/damaged.state.json", b"nonsense")
    land(home, "parcels/a.jsonl", ROWS)
    assert look() == 1
    assert read_state(open_store(), "whole").claimed is not None


def test_a_broken_lineage_file_holds_up_no_other(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = open_store()
    add_lineage(store, lineage("good"))
    for name, content in (("typo", b"strategi: deal\n"), ("other", b"lineage: good\n"), ("text", b"\xff\n")):
        store.put_bytes(f"lineages/{name}.yaml", content)
    assert [each.lineage for each in list_lineages(store)] == ["good"]
    assert "unknown key 'strategi'" in caplog.text and "is about lineage 'good'" in caplog.text


def small(name: str, base: Path) -> WatchedLineage:
    return lineage(
        name,
        base_model=str(base),
        gate=NO_LIMITS,
        train={"max_steps": 2, "max_prompt_tokens": 192, "checkpoint_steps": 0},
    )


def test_the_server_carries_the_automations_once() -> None:
    from deal_pipeline.server.automations import PROCESS_NEVER_BEGAN, apply_automations, automations

    async def twice() -> list[str]:
        async with get_client() as client:
            await apply_automations(client, PROCESS_NEVER_BEGAN)
            await apply_automations(client, PROCESS_NEVER_BEGAN)
            return sorted(each.name for each in await client.read_automations())

    assert asyncio.run(twice()) == sorted(each.name for each in automations(PROCESS_NEVER_BEGAN))


def test_a_pause_stops_the_files_that_a_run_has_not_begun(
    tiny_base: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file that is being learned is finished."""
    store = open_store()
    add_lineage(store, small("l", tiny_base))
    for name, rows in (("a", ROWS), ("b", ROWS + ROWS.splitlines(keepends=True)[0].replace(b"my", b"our"))):
        land(home, f"parcels/{name}.jsonl", rows)
    learn = flows.watch._adapt_to

    async def learn_and_pause(*arguments: Any) -> Any:
        learned = await learn(*arguments)
        pause_lineage(store, "l", "enough")
        return learned

    monkeypatch.setattr("flows.watch._adapt_to", learn_and_pause)
    result = asyncio.run(adapt_landed("l", settle_seconds=0))
    assert [seen.key for seen in result.files] == ["inbox/parcels/a.jsonl"]
    assert result.runs == (), "a run that goes on keeps no result of each arrival, which has an accuracy matrix"
    assert {key: note.state for key, note in read_state(store, "l").arrivals.items()} == {
        "inbox/parcels/b.jsonl": "waiting"
    }
