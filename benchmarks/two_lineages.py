"""Two lineages on two workers against one: how much more is learned in the same time under `deal up`.

    python -m benchmarks.two_lineages

Both lineages are in one home. In each round one file lands for the first lineage, and later one for each of the two at
the same moment. The time is from the landing to the end of the last run, so it includes looking into the inbox and
starting the run. Every process has one thread. A tiny base model: the sharing is measured, not the model. The machine
needs two idle cores, which the servers use too.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from prefect.events.clients import PrefectEventSubscriber
from prefect.events.filters import EventFilter, EventNameFilter

from benchmarks.landing import DONE, WAIT_SECONDS, deal, free_ports
from benchmarks.output import write_result
from benchmarks.tiny_base import EXAMPLES, NO_LIMITS, build_tiny_base

LINEAGES = ("first", "second")


async def seconds_to_learn(home: Path, stack: dict[str, Any], lineages: Sequence[str], name: str, text: str) -> float:
    """Land a file for each of the lineages; seconds until the last of their runs has ended."""
    waiting = set(lineages)
    async with (
        asyncio.timeout(WAIT_SECONDS),
        PrefectEventSubscriber(
            api_url=f"{stack['prefect_url']}/api", filter=EventFilter(event=EventNameFilter(name=[DONE]))
        ) as events,
    ):
        started = time.time()
        for lineage in lineages:
            (home / "store" / "inbox" / f"task-{lineage}" / name).write_text(text)
        async for event in events:
            run = event.resource.get("prefect.resource.name") or ""
            if event.occurred.timestamp() > started and run.startswith("adapt-landed-"):
                waiting.discard(run.removeprefix("adapt-landed-"))
            if not waiting:
                return event.occurred.timestamp() - started
    raise RuntimeError("Prefect's events ended before the runs did")


def main(
    rounds: Annotated[int, typer.Option(help="Measurements of each kind, in turns.")] = 3,
    steps: Annotated[int, typer.Option(help="Optimiser steps of an arrival.")] = 1500,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("benchmarks/results/two_lineages.json"),
) -> None:
    """Print and write how many times as much two lineages learn as one, in the same time."""
    os.environ["OMP_NUM_THREADS"] = "1"
    lines = (EXAMPLES / "parcels" / "messages.jsonl").read_text().splitlines(keepends=True)
    size = len(lines) // (2 * rounds + 1)
    files = ["".join(lines[i * size : (i + 1) * size]) for i in range(2 * rounds + 1)]
    with tempfile.TemporaryDirectory(prefix="deal-two-lineages-") as work:
        home, base, spec = Path(work) / "home", Path(work) / "base", Path(work) / "lineage.yaml"
        base.mkdir()
        build_tiny_base(base)
        for lineage in LINEAGES:
            (home / "store" / "inbox" / f"task-{lineage}").mkdir(parents=True)
        prefect_port, mlflow_port = free_ports(2)
        stack = deal(
            home, "up", "--prefect-port", str(prefect_port), "--mlflow-port", str(mlflow_port), "--trainings", "2"
        )
        try:
            for lineage in LINEAGES:
                spec.write_text(json.dumps({  # JSON is YAML
                    "lineage": lineage, "base_model": str(base), "tasks": [f"task-{lineage}"], "gate": NO_LIMITS,
                    "train": {"max_steps": steps, "checkpoint_steps": 0},
                }))  # fmt: skip
                deal(home, "lineage", "add", str(spec))

            def measure(number: int, lineages: Sequence[str]) -> float:
                return asyncio.run(seconds_to_learn(home, stack, lineages, f"{number}.jsonl", files[number]))

            measure(0, LINEAGES)  # the first runs load what later ones find in memory
            pairs = [
                {"one": measure(2 * number + 1, LINEAGES[:1]), "two": measure(2 * number + 2, LINEAGES)}
                for number in range(rounds)
            ]
        finally:
            deal(home, "down")
    ratios = [2 * pair["one"] / pair["two"] for pair in pairs]
    write_result(out, {
        "num_rounds": rounds, "steps": steps, "cores": os.cpu_count(), "seconds": pairs,
        "times_as_much": {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)},
    })  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
