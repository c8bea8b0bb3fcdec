"""`deal up` for real: both servers and the workers as processes, the store behind S3, landings through SQS."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import httpx
import psutil
import pytest
import tenacity
import yaml
from moto.server import ThreadedMotoServer
from prefect.events import Event
from prefect.events.clients import PrefectEventSubscriber
from prefect.events.filters import EventFilter, EventNameFilter

from infra.registry import VersionInfo, open_registry
from infra.settings import TrackingSettings
from tasks.announcements import ARRIVAL_LANDED
from tests.e2e.command import DEAL

EXAMPLES = Path(__file__).parents[2] / "examples"
BUCKET = "landings"
SECRET = "a-planted-secret-key"
DONE = "prefect.flow-run.Completed"
CRASHED = "prefect.flow-run.Crashed"
WAIT_SECONDS = 240

pytestmark = pytest.mark.e2e


@dataclass
class Whole:
    """What is up, and how to look into it."""

    home: Path
    environment: dict[str, str]
    s3: Any
    prefect_url: str
    mlflow_url: str

    def deal(self, *arguments: str) -> str:
        done = subprocess.run(
            [*DEAL, *arguments], env=self.environment, capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def add_lineage(self, name: str, base: Path, tasks: list[str], **train: Any) -> None:
        values = {
            "lineage": name, "base_model": str(base), "tasks": tasks,
            "gate": {"min_gain_points": -100.0, "max_drop_points": 100.0},
            "train": {"max_steps": 2, "max_prompt_tokens": 192, "checkpoint_steps": 0, **train},
        }  # fmt: skip
        path = self.home / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        self.deal("lineage", "add", str(path))

    def land(self, key: str, rows: list[dict[str, str]]) -> None:
        body = "".join(json.dumps(row) + "\n" for row in rows).encode()
        self.s3.put_object(Bucket=BUCKET, Key=f"team/inbox/{key}", Body=body)

    def read(self, key: str) -> Any:
        return json.loads(self.s3.get_object(Bucket=BUCKET, Key=f"team/{key}")["Body"].read())

    def versions(self, lineage: str) -> tuple[VersionInfo, ...]:
        settings = TrackingSettings.model_validate({"home": self.home, "tracking_uri": self.mlflow_url})
        return open_registry(settings).versions(lineage)

    async def events(self, *names: str) -> Any:
        """Events of these names as the server takes them in."""
        wanted = EventFilter(event=EventNameFilter(name=list(names)))
        async with PrefectEventSubscriber(api_url=f"{self.prefect_url}/api", filter=wanted) as events:
            async for event in events:
                yield event


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Whole]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"aws_access_key_id": "somebody", "aws_secret_access_key": SECRET, "region_name": "us-east-1"}
    s3, sqs = (boto3.client(name, endpoint_url=f"http://{host}:{port}", **keys) for name in ("s3", "sqs"))
    s3.create_bucket(Bucket=BUCKET)
    queue = sqs.create_queue(QueueName="landed")["QueueUrl"]
    arn = sqs.get_queue_attributes(QueueUrl=queue, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
    s3.put_bucket_notification_configuration(
        Bucket=BUCKET,
        NotificationConfiguration={"QueueConfigurations": [{"QueueArn": arn, "Events": ["s3:ObjectCreated:*"]}]},
    )
    home = tmp_path_factory.mktemp("up") / "home"
    home.mkdir()
    ports = [free_port(), free_port()]
    dropped = {"PREFECT_API_URL", "MLFLOW_TRACKING_URI"}
    environment = {name: value for name, value in os.environ.items() if name not in dropped} | {
        "DEAL_HOME": str(home), "DEAL_CACHE_DIR": str(home / "cache"), "DEAL_STORE_URI": f"s3://{BUCKET}/team",
        "DEAL_S3_ENDPOINT_URL": f"http://{host}:{port}", "DEAL_S3_REGION": "us-east-1",
        "DEAL_S3_ACCESS_KEY_ID": "somebody", "DEAL_S3_SECRET_ACCESS_KEY": SECRET, "DEAL_LANDING_QUEUE_URL": queue,
    }  # fmt: skip
    found = Whole(home, environment, s3, f"http://127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[1]}")
    try:
        found.deal("up", "--prefect-port", str(ports[0]), "--mlflow-port", str(ports[1]), "--trainings", "2")
        yield found
    finally:
        found.deal("down")
        server.stop()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def rows_of(task: str) -> list[dict[str, str]]:
    lines = (EXAMPLES / "parcels" / "messages.jsonl").read_text().splitlines()
    return [{**json.loads(line), "task": task} for line in lines]


def tree_of(home: Path) -> dict[int, str]:
    """Processes that `deal up` started here, with all below them."""
    parts = json.loads((home / "stack.json").read_text())["parts"]
    found = {}
    for part in parts:
        root = psutil.Process(part["pid"])
        for process in (root, *root.children(recursive=True)):
            found[process.pid] = part["name"]
    return found


async def wait_until_learned(whole: Whole, wanted: dict[str, int], events: Any) -> list[Event]:
    """Look at the registry after every run that ends, until each lineage has so many versions."""
    seen = []
    async with asyncio.timeout(WAIT_SECONDS):
        async for event in events:
            seen.append(event)
            counts = {name: len(await asyncio.to_thread(whole.versions, name)) for name in wanted}
            if counts == wanted:
                return seen
    raise AssertionError("the server ended the stream")


def test_what_lands_is_adapted_once_in_order_and_two_lineages_at_once(whole: Whole, tiny_base: Path) -> None:
    rows = rows_of("parcels")
    for name in ("one", "two"):
        whole.add_lineage(name, tiny_base, [f"parcels-{name}"])
    size = len(rows) // 6

    async def landing() -> None:
        events = whole.events(DONE, ARRIVAL_LANDED)
        waiting = asyncio.create_task(wait_until_learned(whole, {"one": 6, "two": 2}, events))
        await asyncio.sleep(0)  # the stream is open before anything lands
        for number in range(6):
            whole.land(f"parcels-one/{number}.jsonl", rows[number * size : (number + 1) * size])
            if number < 2:
                whole.land(f"parcels-two/{number}.jsonl", rows[number * size : (number + 1) * size])
        whole.land("parcels-one/again.jsonl", rows[:size])  # the first one's bytes under another name
        await waiting

    asyncio.run(landing())
    for name, count in (("one", 6), ("two", 2)):
        versions = whole.versions(name)
        assert [version.parent_version for version in versions] == [None, *map(str, range(1, count))], "one line"
        files = whole.read(f"watch/{name}.json")["files"]
        order = {entry["version"]: key for key, entry in files.items() if entry["outcome"] == "promoted"}
        assert [order[str(number + 1)] for number in range(count)] == [
            f"inbox/parcels-{name}/{number}.jsonl" for number in range(count)
        ]
    one, two = whole.versions("one"), whole.versions("two")
    assert two[0].created < one[-1].created, "the second lineage did not wait for the first one's end"


def test_a_training_that_is_killed_goes_on_and_is_registered_once(whole: Whole, tiny_base: Path) -> None:
    whole.add_lineage("three", tiny_base, ["killed"], max_steps=400, checkpoint_steps=20)

    async def kill() -> None:
        events = whole.events(CRASHED, DONE)
        waiting = asyncio.create_task(wait_until_learned(whole, {"three": 1}, events))
        await asyncio.sleep(0)
        whole.land("killed/a.jsonl", rows_of("killed"))
        async with asyncio.timeout(WAIT_SECONDS):
            while not list(whole.home.glob("work/three/*/checkpoints/checkpoint-*/COMPLETE")):
                await asyncio.sleep(0.1)
        for pid, name in tree_of(whole.home).items():
            if name == "worker-deal-gpu" and "prefect.engine" in " ".join(psutil.Process(pid).cmdline()):
                os.kill(pid, signal.SIGKILL)
        seen = await waiting
        assert CRASHED in [event.event for event in seen]

    asyncio.run(kill())
    (version,) = whole.versions("three")
    assert "champion" in version.aliases
    findings = whole.read(f"{version.adapter_uri}/findings.json")
    assert findings["training"]["resumed_from_step"] >= 20, "it went on from a checkpoint"


def test_status_shows_the_whole_and_no_log_shows_a_secret(whole: Whole) -> None:
    status = json.loads(whole.deal("status", "--json"))
    assert [part["is_alive"] for part in status["parts"]] == [True] * 5
    assert {each["lineage"]: each["num_open"] for each in status["lineages"]} == {"one": 0, "three": 0, "two": 0}
    assert SECRET not in json.dumps(status)
    for log in (whole.home / "logs").iterdir():
        assert SECRET not in log.read_text(errors="replace"), log


def test_a_server_that_is_killed_is_started_again(whole: Whole) -> None:
    def pid_of(name: str) -> int:
        parts = json.loads((whole.home / "stack.json").read_text())["parts"]
        return next(part["pid"] for part in parts if part["name"] == name)

    before = pid_of("mlflow-server")
    os.kill(before, signal.SIGKILL)
    for attempt in tenacity.Retrying(wait=tenacity.wait_fixed(0.5), stop=tenacity.stop_after_delay(WAIT_SECONDS)):
        with attempt:
            assert pid_of("mlflow-server") != before
            assert httpx.get(f"{whole.mlflow_url}/health").is_success
    assert len(whole.versions("one")) == 6


def test_everything_listens_on_loopback_alone(whole: Whole) -> None:
    mine = set(tree_of(whole.home))
    listening = {c.laddr.ip for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.pid in mine}
    assert listening and listening <= {"127.0.0.1", "::1"}


def test_a_second_up_is_refused(whole: Whole) -> None:
    again = subprocess.run([*DEAL, "up"], env=whole.environment, capture_output=True, text=True, check=False)
    assert again.returncode == 2 and "up already" in again.stderr + again.stdout
