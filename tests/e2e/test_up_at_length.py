"""`deal server up` at length: many arrivals at once, each server cut off for a minute, and a file that ends its reader.

`make nightly` runs it.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from infra.lineage_state import read_ended
from tests.e2e.whole import DONE, WAIT_SECONDS, Whole, rows_of, wait_until_learned
from tests.hostile_parquet import ABORTS

OUTAGE_SECONDS = 60.0

pytestmark = [pytest.mark.e2e, pytest.mark.nightly(minutes=4)]


def test_forty_arrivals_of_two_lineages_within_ten_seconds(whole: Whole, tiny_base: Path) -> None:
    rows = rows_of("many")
    wanted = {"thirty": 30, "ten": 10}
    for name in wanted:
        whole.add_lineage(name, tiny_base, [name])

    async def landing() -> None:
        waiting = asyncio.create_task(wait_until_learned(whole, wanted, whole.events(DONE), seconds=3600))
        await asyncio.sleep(0)
        async with asyncio.timeout(10):
            for name, count in wanted.items():
                for number in range(count):
                    chosen = [{**row, "text": f"{row['text']} ({number})"} for row in rows[:20]]
                    await asyncio.to_thread(whole.land, f"{name}/{number:02d}.jsonl", chosen)
        await waiting

    asyncio.run(landing())
    for name, count in wanted.items():
        versions = whole.versions(name)
        assert [version.parent_version for version in versions] == [None, *map(str, range(1, count))]
        assert whole.learned(name) == [f"inbox/{name}/{number:02d}.jsonl" for number in range(count)]
    assert whole.versions("ten")[0].created < whole.versions("thirty")[-1].created


def cut_off_part(name: str) -> Callable[[Whole], Callable[[], None]]:
    """End a server and the supervisor; the returned function restarts both."""

    def cut(whole: Whole) -> Callable[[], None]:
        for each in json.loads((whole.home / "stack.json").read_text())["parts"]:
            if each["name"] == "supervisor":
                os.kill(each["pid"], signal.SIGKILL)
        for each in json.loads((whole.home / "stack.json").read_text())["parts"]:
            if each["name"] == name:
                os.killpg(each["pid"], signal.SIGKILL)
        return whole.up

    return cut


def cut_off_store(whole: Whole) -> Callable[[], None]:
    """Stop the S3 server, which keeps its objects in this process."""
    whole.store_server.stop()
    return whole.store_server.start


@pytest.mark.parametrize(
    ("name", "cut"),
    [
        ("prefect", cut_off_part("prefect-server")),
        ("mlflow", cut_off_part("mlflow-server")),
        ("store", cut_off_store),
    ],
)
def test_a_server_that_is_away_for_a_minute_ends_no_run(
    name: str, cut: Callable[[Whole], Callable[[], None]], whole: Whole, tiny_base: Path
) -> None:
    whole.add_lineage(name, tiny_base, [name], max_steps=1500, checkpoint_steps=50)

    async def outage() -> None:
        whole.land(f"{name}/a.jsonl", rows_of(name))
        while not list(whole.home.glob(f"work/{name}/*/checkpoints/checkpoint-*/COMPLETE")):
            await asyncio.sleep(0.1)
        back = await asyncio.to_thread(cut, whole)
        await asyncio.sleep(OUTAGE_SECONDS)
        await asyncio.to_thread(back)
        await wait_until_learned(whole, {name: 1}, whole.events(DONE), seconds=900)

    asyncio.run(outage())
    (version,) = whole.versions(name)
    assert "champion" in version.aliases
    ends = read_ended(whole.store(), name).values()
    assert [(end.outcome, end.num_tries) for end in ends] == [("promoted", 1)]


def test_a_file_that_ends_its_reader_stops_no_worker_and_is_set_aside(whole: Whole, tiny_base: Path) -> None:
    """It lands between two good files. It is tried twice, a minute apart."""
    rows = rows_of("brave")
    bad = "inbox/brave/b.parquet"
    whole.add_lineage("brave", tiny_base, ["brave"])

    def has_settled() -> bool:
        end = read_ended(whole.store(), "brave").get(bad)
        return len(whole.learned("brave")) == 2 and end is not None and end.outcome == "refused"

    async def landing() -> None:
        events = whole.events(DONE)
        async with asyncio.timeout(WAIT_SECONDS):
            looking = asyncio.create_task(anext(events))
            await asyncio.sleep(0)  # the stream is open before anything lands
            whole.land("brave/a.jsonl", rows[::2])
            whole.put(bad, ABORTS.read_bytes())
            whole.land("brave/c.jsonl", rows[1::2])
            await looking
            async for _ in events:
                if await asyncio.to_thread(has_settled):
                    return

    asyncio.run(landing())
    assert sorted(whole.learned("brave")) == ["inbox/brave/a.jsonl", "inbox/brave/c.jsonl"]
    assert read_ended(whole.store(), "brave")[bad].num_tries == 2
    (lineage,) = [each for each in json.loads(whole.deal("status", "--json"))["lineages"] if each["lineage"] == "brave"]
    (reason,) = lineage["failed"]
    assert reason.startswith(f"{bad}: b.parquet ended the process that reads it (SIGABRT") and "in 2 tries" in reason
    assert lineage["num_open"] == 0
