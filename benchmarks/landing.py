"""How long after a file has landed its adaptation runs, and takes its first step, under `deal up`.

    python -m benchmarks.landing

Servers and workers are brought up in an empty home; files of rows land in its inbox one after another, each when the
one before is learned. The inbox is looked into at an interval, which the time from landing to event has in it; what the
pipeline itself takes is the time from that event on. A tiny base model, so that nothing waits for weights.
"""

from __future__ import annotations

import asyncio
import json
import socket
import statistics
import subprocess
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from prefect.events.clients import PrefectEventSubscriber
from prefect.events.filters import EventFilter, EventNameFilter

from benchmarks.output import DEAL, bare_environment, write_result
from benchmarks.tiny_base import EXAMPLES, NO_LIMITS, build_tiny_base
from infra.settings import TrackingSettings
from infra.tracking.registry import open_registry
from tasks.arrival_runs import ARRIVAL_LANDED

LINEAGE, TASK = "landing", "parcels"
RUNNING, DONE = "prefect.flow-run.Running", "prefect.flow-run.Completed"
WAIT_SECONDS = 300


def deal(home: Path, *arguments: str) -> Any:
    """Run a command in the home and return what it prints."""
    done = subprocess.run(
        [*DEAL, *arguments, "--home", str(home), "--json"], env=bare_environment(), check=True, stdout=subprocess.PIPE
    )
    return json.loads(done.stdout)


def free_ports(count: int) -> list[int]:
    """Ports of the loopback address that nothing listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


async def land(home: Path, stack: dict[str, Any], name: str, text: str) -> dict[str, float]:
    """Land a file and follow it; seconds from the landing to each thing that happens."""
    wanted = EventFilter(event=EventNameFilter(name=[ARRIVAL_LANDED, RUNNING, DONE]))
    seen: dict[str, datetime] = {}
    async with (
        asyncio.timeout(WAIT_SECONDS),
        PrefectEventSubscriber(api_url=f"{stack['prefect_url']}/api", filter=wanted) as events,
    ):
        landed = datetime.now(UTC)
        (home / "store" / "inbox" / TASK / name).write_text(text)
        async for event in events:
            if event.occurred < landed:  # the stream begins with what was before
                continue
            is_ours = (event.resource.get("prefect.resource.name") or "").startswith("adapt-landed-")
            if event.event == ARRIVAL_LANDED or (is_ours and ARRIVAL_LANDED in seen):
                seen.setdefault(event.event, event.occurred)
            if DONE in seen:
                break
    settings = TrackingSettings.model_validate({"home": home, "tracking_uri": stack["mlflow_url"]})
    registry = open_registry(settings)
    (version,) = registry.versions(LINEAGE, newest=1)
    losses = registry.client.get_metric_history(version.tracking_id, "train/loss")
    first_step = datetime.fromtimestamp(min(point.timestamp for point in losses) / 1000, UTC)
    times = {"event": seen[ARRIVAL_LANDED], "running": seen[RUNNING], "first_step": first_step, "learned": seen[DONE]}
    return {name: (at - landed).total_seconds() for name, at in times.items()}


def main(
    landings: Annotated[int, typer.Option(help="Files that land.")] = 5,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("benchmarks/results/landing.json"),
) -> None:
    """Print and write the median seconds from a landing to its event, its run and its first step."""
    lines = (EXAMPLES / TASK / "messages.jsonl").read_text().splitlines(keepends=True)
    size = len(lines) // landings
    with tempfile.TemporaryDirectory(prefix="deal-landing-") as work:
        home, base = Path(work) / "home", Path(work) / "base"
        base.mkdir()
        build_tiny_base(base)
        spec = Path(work) / "lineage.yaml"
        spec.write_text(json.dumps({  # JSON is YAML
            "lineage": LINEAGE, "base_model": str(base), "tasks": [TASK], "gate": NO_LIMITS, "train": {"max_steps": 2},
        }))  # fmt: skip
        (home / "store" / "inbox" / TASK).mkdir(parents=True)
        prefect_port, mlflow_port = free_ports(2)
        stack = deal(home, "up", "--prefect-port", str(prefect_port), "--mlflow-port", str(mlflow_port))
        try:
            deal(home, "lineage", "add", str(spec))
            runs = [
                asyncio.run(land(home, stack, f"{i}.jsonl", "".join(lines[i * size : (i + 1) * size])))
                for i in range(landings)
            ]
        finally:
            deal(home, "down")
    write_result(out, {
        "num_landings": landings,
        "median_seconds_from_landing": {name: statistics.median(run[name] for run in runs) for name in runs[0]},
        "median_seconds_from_event_to_running": statistics.median(run["running"] - run["event"] for run in runs),
        "slowest_seconds_from_event_to_running": max(run["running"] - run["event"] for run in runs),
        "landings": runs,
    })  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
