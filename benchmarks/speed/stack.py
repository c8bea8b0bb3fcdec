"""How fast `deal server up` learns what lands: from a file to its run, and two lineages against one.

    python -m benchmarks.speed.stack landing
    python -m benchmarks.speed.stack two-lineages

Servers and workers are brought up in an empty home, with a tiny base model, so that nothing waits for weights.

landing: files of rows land in the inbox one after another, each when the one before is learned. The inbox is looked
into at an interval, which is part of the time from landing to run. A thousand arrivals that have ended lie there too.

two-lineages: how much more do two lineages on two workers learn in the same time than one? In each round one file lands
for the first lineage, and later one for each of the two at the same moment. The time is from the landing to the end of
the last run. Every process has one thread. The machine needs two idle cores, which the servers use too.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from prefect.events.clients import PrefectEventSubscriber
from prefect.events.filters import EventFilter, EventNameFilter

from benchmarks.output import DEAL, RESULTS, Out, bare_environment, write_result
from benchmarks.tiny_base import EXAMPLES, NO_LIMITS, build_tiny_base
from infra.lineage_state import EndedArrival, note_ended
from infra.settings import TrackingSettings
from infra.store.local import FileStore
from infra.tracking.client import open_client
from infra.versions import Versions
from tasks.inbox import look

RUNNING, DONE = "prefect.flow-run.Running", "prefect.flow-run.Completed"
RUN_PREFIX = "adapt-landed-"
WAIT_SECONDS = 300
LINEAGES = ("first", "second")

app = typer.Typer(help=__doc__, rich_markup_mode=None)


def free_ports(count: int) -> list[int]:
    """Ports of the loopback address that nothing listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


def deal(home: Path, *arguments: str) -> Any:
    """Run a command in the home and return what it prints."""
    done = subprocess.run(
        [*DEAL, *arguments, "--home", str(home), "--json"], env=bare_environment(), check=True, stdout=subprocess.PIPE
    )
    return json.loads(done.stdout)


@contextmanager
def stack_of(
    lineages: Sequence[str], train: Mapping[str, int], *options: str, num_ended: int = 0
) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """A home with `deal server up` and these lineages: the home, and its servers' addresses. Each has a task alone.

    `num_ended` files of each lineage lie in the inbox and have ended.
    """
    with tempfile.TemporaryDirectory(prefix="deal-stack-") as work:
        home, base, spec = Path(work) / "home", Path(work) / "base", Path(work) / "lineage.yaml"
        build_tiny_base(base)
        for lineage in lineages:
            inbox_of(home, lineage).mkdir(parents=True)
        prefect_port, mlflow_port = map(str, free_ports(2))
        stack = deal(home, "server", "up", "--prefect-port", prefect_port, "--mlflow-port", mlflow_port, *options)
        try:
            for lineage in lineages:
                spec.write_text(
                    json.dumps(
                        {  # JSON is YAML
                            "lineage": lineage,
                            "base_model": str(base),
                            "tasks": [f"task-{lineage}"],
                            "gate": NO_LIMITS,
                            "train": train,
                        }
                    )
                )
                let_end(home, lineage, num_ended)
                deal(home, "lineage", "apply", str(spec))
            yield home, stack
        finally:
            deal(home, "server", "down")


def inbox_of(home: Path, lineage: str) -> Path:
    """The inbox of a lineage's task."""
    return home / "store" / "inbox" / f"task-{lineage}"


def let_end(home: Path, lineage: str, count: int) -> None:
    """Land files for a lineage that does not learn yet, and note that they have ended."""
    for number in range(count):
        row = {"text": f"message {number}", "label": "x"}
        (inbox_of(home, lineage) / f"ended-{number}.jsonl").write_text(json.dumps(row) + "\n")
    store, now = FileStore(home / "store"), datetime.now(UTC)
    ends = {
        arrival.key: EndedArrival(
            etag=arrival.etag, written=arrival.written, outcome="promoted", message="Learned.", version="1", at=now
        )
        for arrival in look(store).of([f"task-{lineage}"])
    }
    note_ended(store, lineage, ends)


def texts_to_land(count: int) -> list[str]:
    """The rows of an example, in files of equal length."""
    lines = (EXAMPLES / "parcels" / "messages.jsonl").read_text().splitlines(keepends=True)
    size = len(lines) // count
    return ["".join(lines[i * size : (i + 1) * size]) for i in range(count)]


def events_of(stack: Mapping[str, Any], *names: str) -> PrefectEventSubscriber:
    """Prefect's events of these names."""
    return PrefectEventSubscriber(
        api_url=f"{stack['prefect_url']}/api", filter=EventFilter(event=EventNameFilter(name=list(names)))
    )


async def land(home: Path, stack: Mapping[str, Any], lineage: str, name: str, text: str) -> dict[str, float]:
    """Land a file and follow it; seconds from the landing to each thing that happens."""
    seen: dict[str, datetime] = {}
    async with asyncio.timeout(WAIT_SECONDS), events_of(stack, RUNNING, DONE) as events:
        landed = datetime.now(UTC)
        (inbox_of(home, lineage) / name).write_text(text)
        async for event in events:
            if event.occurred < landed:  # the stream begins with what was before
                continue
            is_ours = (event.resource.get("prefect.resource.name") or "").startswith(RUN_PREFIX)
            if is_ours:
                seen.setdefault(event.event, event.occurred)
            if DONE in seen:
                break
    run_key = Versions(FileStore(home / "store")).all(lineage)[-1].run_key
    settings = TrackingSettings.model_validate({"home": home, "tracking_uri": stack["mlflow_url"]})
    client = open_client(settings)  # the store's curve of losses has no times
    experiments = [each.experiment_id for each in client.search_experiments()]
    (run,) = client.search_runs(experiments, f"tags.`deal.run_key` = '{run_key}'")
    losses = client.get_metric_history(run.info.run_id, "train/loss")
    first_step = datetime.fromtimestamp(min(point.timestamp for point in losses) / 1000, UTC)
    times = {"running": seen[RUNNING], "first_step": first_step, "learned": seen[DONE]}
    return {name: (at - landed).total_seconds() for name, at in times.items()}


@app.command()
def landing(
    landings: Annotated[int, typer.Option(help="Files that land.")] = 5,
    ended: Annotated[int, typer.Option(help="Files in the inbox that have ended.")] = 1000,
    out: Out = RESULTS / "landing.json",
) -> None:
    """The median seconds from a landing to its run and its first step, and the processor time of `deal status`."""
    with stack_of(["landing"], {"max_steps": 2}, num_ended=ended) as (home, stack):
        runs = [
            asyncio.run(land(home, stack, "landing", f"{number}.jsonl", text))
            for number, text in enumerate(texts_to_land(landings))
        ]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        deal(home, "status")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    write_result(
        out,
        {
            "num_landings": landings,
            "num_ended": ended,
            "processor_seconds_of_status": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
            "median_seconds_from_landing": {name: statistics.median(run[name] for run in runs) for name in runs[0]},
            "slowest_seconds_from_landing_to_running": max(run["running"] for run in runs),
            "landings": runs,
        },
    )


async def seconds_to_learn(
    home: Path, stack: Mapping[str, Any], lineages: Sequence[str], name: str, text: str
) -> float:
    """Land a file for each of the lineages; seconds until the last of their runs has ended."""
    waiting = set(lineages)
    async with asyncio.timeout(WAIT_SECONDS), events_of(stack, DONE) as events:
        started = time.time()
        for lineage in lineages:
            (inbox_of(home, lineage) / name).write_text(text)
        async for event in events:
            run = event.resource.get("prefect.resource.name") or ""
            if event.occurred.timestamp() > started and run.startswith(RUN_PREFIX):
                waiting.discard(run.removeprefix(RUN_PREFIX))
            if not waiting:
                return event.occurred.timestamp() - started
    raise RuntimeError("Prefect's events ended before the runs did")


@app.command()
def two_lineages(
    rounds: Annotated[int, typer.Option(help="Measurements of each kind, in turns.")] = 3,
    steps: Annotated[int, typer.Option(help="Optimiser steps of an arrival.")] = 1500,
    out: Out = RESULTS / "two_lineages.json",
) -> None:
    """How many times as much two lineages learn as one, in the same time."""
    os.environ["OMP_NUM_THREADS"] = "1"
    files = texts_to_land(2 * rounds + 1)
    with stack_of(LINEAGES, {"max_steps": steps, "checkpoint_steps": 0}, "--trainings", "2") as (home, stack):

        def measure(number: int, lineages: Sequence[str]) -> float:
            return asyncio.run(seconds_to_learn(home, stack, lineages, f"{number}.jsonl", files[number]))

        measure(0, LINEAGES)  # the first runs load what later ones find in memory
        pairs = [
            {"one": measure(2 * number + 1, LINEAGES[:1]), "two": measure(2 * number + 2, LINEAGES)}
            for number in range(rounds)
        ]
    ratios = [2 * pair["one"] / pair["two"] for pair in pairs]
    write_result(
        out,
        {
            "num_rounds": rounds,
            "steps": steps,
            "cores": os.cpu_count(),
            "seconds": pairs,
            "times_as_much": {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)},
        },
    )


if __name__ == "__main__":
    app()
