"""When to train, with a Prefect server: by schedule, rows, waiting time and budget; skipped; and killed in between."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import tenacity
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterDeploymentId

import tasks.arrivals
from benchmarks.tiny_base import NO_LIMITS
from deal_pipeline.server.status import read_status
from flows.sensor import retrain
from flows.watch import WatchResult, adapt_landed, watch
from infra.launch import launch_job
from infra.lineage_state import read_state
from infra.store.base import ObjectStore
from infra.store.opening import open_store
from infra.versions import Version, Versions
from tasks import scorer
from tasks.arrival_queue import claim, plan
from tasks.lineage.datasets import read_manifest
from tasks.lineage.reports import read_page
from tasks.lineage.retrain import RetrainPolicy, Waiting
from tasks.lineage.settings import WatchedLineage, add_lineage, read_lineage
from tasks.progress import reporting_to
from tasks.spec import parse
from tests import arriving
from tests.arriving import Said
from tests.in_process import deal, deal_json
from tests.registering import mlflow_run

EXAMPLES = Path(__file__).parents[2] / "data" / "examples"
ROWS = (EXAMPLES / "parcels" / "messages.jsonl").read_bytes().splitlines(keepends=True)
BANK = (EXAMPLES / "bank" / "train.jsonl").read_bytes().splitlines(keepends=True)
WEEKLY = {"when": "schedule", "cron": "0 2 * * 0"}
DAY = timedelta(days=1)
ALWAYS = 1e-9
"""A probability per token that the tiny base has for every right answer."""
NUM_LEFT = len(ROWS) - 60
"""Fewer than the fifty rows that a test waits for."""

pytestmark = pytest.mark.usefixtures("prefect_api", "home", "adapt_deployment")


def now() -> datetime:
    return datetime.now(UTC)


def add(base: Path, *, num_processes: int = 1, **policy: Any) -> WatchedLineage:
    values = {
        "lineage": "l",
        "base_model": str(base),
        "gate": NO_LIMITS,
        "train": {"max_steps": 2, "max_prompt_tokens": 192, "checkpoint_steps": 0, "num_processes": num_processes},
        "retrain": policy,
    }
    add_lineage(open_store(), parse(WatchedLineage, values, "test"), values)
    return read_lineage(open_store(), "l")


def land(home: Path, name: str, rows: list[bytes], age: float = 100) -> None:
    arriving.land(home, name, b"".join(rows), age)


@contextmanager
def deciding(at: datetime) -> Iterator[None]:
    """Let the settings `retrain` decide as at this time, or as now if that is later, since failures have real times."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            tasks.arrivals,
            "plan",
            lambda state, policy, _, hours, **more: plan(state, policy, max(at, now()), hours, **more),
        )
        patched.setattr(tasks.arrivals, "claim", lambda state, **more: claim(state, **{**more, "now": max(at, now())}))
        yield


def start(at: datetime) -> int:
    """The runs that one run of the deployment `retrain` starts."""
    with deciding(at):
        return asyncio.run(retrain())


def learn(at: datetime) -> list[tuple[str, str, str | None]]:
    """File, outcome and version of all that a run of the deployment `adapt` learns."""
    with deciding(at):
        return handled(asyncio.run(adapt_landed("l", settle_seconds=0.01)))


def handled(result: WatchResult) -> list[tuple[str, str, str | None]]:
    return [(seen.key.removeprefix("inbox/"), seen.outcome, seen.version) for seen in result.files]


def waiting(home: Path, at: datetime) -> list[Waiting]:
    with deciding(at):
        (status,) = asyncio.run(read_status(home)).lineages
    return list(status.waiting)


def versions() -> tuple[Version, ...]:
    return Versions(open_store()).all("l")


def num_read(version: Version) -> int:
    """Rows of the arrival that a version has learned."""
    folder = next(
        info.key.rpartition("/")[0]
        for info in open_store().list(f"datasets/{version.task}/{version.dataset_sha256}")
        if info.key.endswith("manifest.json")
    )
    return read_manifest(open_store(), folder).num_read


@pytest.mark.usefixtures("without_mlflow")
def test_what_waits_for_a_schedule_is_learned_together_at_its_time(tiny_base: Path, home: Path) -> None:
    add(tiny_base, **WEEKLY)
    land(home, "parcels/1.jsonl", ROWS[:30])
    land(home, "parcels/2.jsonl", ROWS[30:60], age=50)
    sunday = RetrainPolicy(**WEEKLY).next_time(now())
    early = sunday - timedelta(seconds=1)
    assert (start(early), learn(early)) == (0, [])
    (found,) = waiting(home, early)
    assert (found.task, found.num_files, found.num_rows, found.is_due, found.until) == ("parcels", 2, 60, False, sunday)
    assert start(sunday) == 1, "one run for both"
    assert learn(sunday) == [("parcels/1.jsonl", "promoted", "1"), ("parcels/2.jsonl", "promoted", "1")]
    assert [num_read(version) for version in versions()] == [60]
    assert (start(sunday), learn(sunday), waiting(home, sunday)) == (0, [], [])
    land(home, "parcels/3.jsonl", ROWS[60:], age=40)
    assert start(now()) == 0 and len(versions()) == 1, "the schedule's time of this week is not yet there"
    assert start(sunday + DAY) == 1, "it landed before the time"


def test_a_champion_that_answers_the_new_rows_well_enough_learns_nothing(tiny_base: Path, home: Path) -> None:
    add(tiny_base, skip_if_accuracy=ALWAYS)
    land(home, "parcels/task.yaml", [b"metric: loss\n"])
    land(home, "parcels/1.jsonl", ROWS[:40])
    assert learn(now()) == [("parcels/1.jsonl", "promoted", "1")], "a new task has no champion's score"
    assert versions()[0].arrival is None
    tests = {info.key: info.etag for info in open_store().list("datasets") if info.key.endswith("test.parquet")}
    land(home, "parcels/2.jsonl", ROWS[40:60])
    assert learn(now()) == [("parcels/2.jsonl", "skipped", None)]
    assert learn(now()) == [] and start(now()) == 0 and len(versions()) == 1
    left = [info.key for info in open_store().list("datasets")]
    assert not [key for key in left if key.endswith("train.parquet")], "the pipeline keeps no training rows"
    assert tests.items() <= {info.key: info.etag for info in open_store().list("datasets")}.items()

    add(tiny_base, skip_if_accuracy=1.0)
    land(home, "parcels/3.jsonl", ROWS[60:])
    assert learn(now()) == [("parcels/3.jsonl", "promoted", "2")]
    score = versions()[-1].arrival
    assert score is not None and 0 < score.accuracy < 1 and score.num_rows == NUM_LEFT
    newest = versions()[-1]
    assert mlflow_run("l", newest.run_key).data.metrics["arrival/accuracy"] == score.accuracy
    assert score.figure in read_page(open_store(), versions(), newest.version)[1]
    shown = deal("version", "list", "--lineage", "l")
    assert "on arrival" in shown and f"{100 * score.accuracy:.1f}" in shown


@pytest.mark.nightly
def test_several_processes_score_the_champion_on_the_new_rows_as_one_does(
    tiny_base: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[Any] = []

    def launch(store: ObjectStore, job: Any, *rest: Any) -> Any:
        jobs.append(job)
        return launch_job(store, job, *rest)

    monkeypatch.setattr(scorer, "launch_job", launch)
    land(home, "parcels/task.yaml", [b"metric: loss\n"])
    add(tiny_base, skip_if_accuracy=ALWAYS)
    land(home, "parcels/1.jsonl", ROWS[:40])
    learn(now())
    said = []
    for number in (1, 2):
        add(tiny_base, num_processes=number, skip_if_accuracy=ALWAYS)
        land(home, f"parcels/of-{number}.jsonl", ROWS[40:61])
        with deciding(now()):
            (seen,) = asyncio.run(adapt_landed("l", settle_seconds=0.01)).files
        assert seen.outcome == "skipped"
        said.append(seen.message)
    assert said[0] == said[1] and [(job.kind, job.num_processes) for job in jobs] == [("answer", 2)]
    assert not list((home / "tmp").iterdir()), "the files of the processes were not deleted"


@pytest.mark.usefixtures("without_mlflow")
def test_new_labels_are_learned_however_well_the_champion_answers_the_other_rows(tiny_base: Path, home: Path) -> None:
    add(tiny_base, skip_if_accuracy=ALWAYS)
    land(home, "parcels/task.yaml", [b"metric: loss\n"])
    land(home, "parcels/1.jsonl", ROWS[:40])
    learn(now())
    deal("task", "add-label", "parcels", "stolen parcel", "--lineage", "l")
    row = {**json.loads(ROWS[60]), "label": "stolen parcel"}
    land(home, "parcels/2.jsonl", [*ROWS[40:60], json.dumps(row).encode() + b"\n"])
    assert learn(now()) == [("parcels/2.jsonl", "promoted", "2")]


@pytest.mark.usefixtures("without_mlflow")
def test_what_exceeds_the_months_budget_waits_for_the_next_month(tiny_base: Path, home: Path) -> None:
    policy = add(tiny_base, budget_hours=1e-6).retrain
    land(home, "parcels/1.jsonl", ROWS[:40], age=200)
    land(home, "bank/1.jsonl", BANK[:40])
    assert start(now()) == 1
    assert learn(now()) == [("parcels/1.jsonl", "promoted", "1")], "it used up the budget, and the other waits"
    (found,) = waiting(home, now())
    _, following = policy.month_of(now())
    assert (found.task, found.is_due, found.until) == ("bank", False, following)
    assert "training hours of this month are used" in found.line()
    assert learn(following) == [("bank/1.jsonl", "promoted", "2")]


@pytest.mark.usefixtures("without_mlflow")
def test_a_run_that_was_killed_learns_exactly_the_files_that_it_had_fixed(tiny_base: Path, home: Path) -> None:
    add(tiny_base, min_rows=50)
    land(home, "parcels/1.jsonl", ROWS[:30], age=200)
    land(home, "parcels/2.jsonl", ROWS[30:55], age=100)
    kill_at_the_training()
    (batch,) = read_state(open_store(), "l").batches
    assert batch.files == ("inbox/parcels/1.jsonl", "inbox/parcels/2.jsonl")
    land(home, "parcels/0.jsonl", ROWS[60:], age=300)
    assert [(each.num_rows, each.is_due) for each in waiting(home, now())] == [(55, True), (NUM_LEFT, False)]
    assert learn(now()) == [("parcels/1.jsonl", "promoted", "1"), ("parcels/2.jsonl", "promoted", "1")]
    assert [num_read(version) for version in versions()] == [55]
    assert read_state(open_store(), "l").batches == () and learn(now()) == []
    (left,) = waiting(home, now())
    assert (left.num_files, left.num_rows) == (1, NUM_LEFT), "what landed later waits for more rows"


def kill_at_the_training() -> None:
    """Let a process of its own learn what is due, and kill it when it begins."""
    script = """
import asyncio, sys, time
import flows.watch
from infra.store.opening import open_store
from tasks.lineage.settings import read_lineage

async def hang(*arguments):
    print("begins", flush=True)
    time.sleep(600)

flows.watch._adapt_to = hang
asyncio.run(flows.watch.watch.fn(read_lineage(open_store(), "l"), True, 0.01))
"""
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    try:
        assert any(line == "begins\n" for line in child.stdout)
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()


@pytest.mark.usefixtures("without_mlflow")
def test_a_bad_file_is_refused_alone_and_the_good_ones_are_learned(tiny_base: Path, home: Path) -> None:
    add(tiny_base, min_rows=50)
    land(home, "parcels/damaged.parquet", [b"nonsense"], age=400)
    land(home, "parcels/empty.jsonl", [], age=350)
    land(home, "parcels/1.jsonl", ROWS[:30], age=300)
    assert [(key, outcome) for key, outcome, _ in learn(now())] == [
        ("parcels/damaged.parquet", "refused"),
        ("parcels/empty.jsonl", "refused"),
    ], "what cannot be counted is refused at once, and the other file waits"
    land(home, "parcels/other.jsonl", [b'{"question": "Who?", "answer": "I."}\n'] * 30, age=200)
    assert sorted(learn(now())) == [
        ("parcels/1.jsonl", "promoted", "1"),
        ("parcels/other.jsonl", "refused", None),
    ], "together they are no arrival"
    assert read_state(open_store(), "l").batches == ()


def test_the_commands_say_what_waits_and_for_how_long(tiny_base: Path, home: Path) -> None:
    spec = add(tiny_base, **WEEKLY, min_rows=200, max_wait_days=7)
    land(home, "parcels/1.jsonl", ROWS[:40])
    said = Said()
    with reporting_to(said):
        result = asyncio.run(watch(spec, once=True, poll_seconds=0.01))
    assert result.files == ()
    (line,) = said.lines
    assert line.startswith("parcels: 1 file with 40 rows has been waiting since ")
    assert "40 of 200 rows have landed; the next check is on Sun " in line
    assert " ".join(line.split()) in " ".join(deal("status").split())
    (lineage,) = deal_json("status")["lineages"]
    assert (lineage["waiting"][0]["num_rows"], lineage["waiting"][0]["is_due"]) == (40, False)


@pytest.mark.nightly
@pytest.mark.usefixtures("deployed")
def test_the_server_starts_one_run_for_a_lineage_whose_time_has_come(tiny_base: Path, home: Path) -> None:
    add(tiny_base, **WEEKLY)
    land(home, "parcels/1.jsonl", ROWS[:30])
    land(home, "bank/1.jsonl", BANK[:30])
    sunday = RetrainPolicy(**WEEKLY).next_time(now())

    async def runs() -> list[dict[str, Any]]:
        async with get_client() as client:
            adapt = await client.read_deployment_by_name("adapt-landed/adapt")
            wanted = FlowRunFilter(deployment_id=FlowRunFilterDeploymentId(any_=[adapt.id]))
            async for attempt in tenacity.AsyncRetrying(
                wait=tenacity.wait_fixed(0.2), stop=tenacity.stop_after_delay(180), reraise=True
            ):
                with attempt:
                    found = await client.read_flow_runs(flow_run_filter=wanted)
                    assert found
            return [run.parameters for run in found]

    assert [start(sunday) for _ in range(3)] == [1, 0, 0]
    assert asyncio.run(runs()) == [{"lineage": "l"}]
