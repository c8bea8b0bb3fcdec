"""`deal server up` for tests, over S3, SQS and, where it is installed, PostgreSQL."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import psutil
import pytest
import yaml
from prefect.events import Event
from prefect.events.clients import PrefectEventSubscriber
from prefect.events.filters import EventFilter, EventNameFilter

from benchmarks.tiny_base import EXAMPLES, NO_LIMITS
from infra.lineage_state import read_ended
from infra.settings import StoreSettings, TrackingSettings
from infra.store.base import ObjectStore
from infra.store.opening import store_at
from infra.versions import Version, Versions
from tests.e2e.command import DEAL
from tests.e2e.postgres import find_binaries, running_postgres
from tests.loopback import free_port
from tests.printed import command_of, require_described
from tests.s3 import ThreadedMotoServer

BUCKET = "landings"
SECRET = "a-planted-secret-key"
DONE = "prefect.flow-run.Completed"
HEARTBEAT = "prefect.flow-run.heartbeat"
CRASHED = "prefect.flow-run.Crashed"
WAIT_SECONDS = 900


@dataclass
class Whole:
    """What is up, and how to look into it."""

    home: Path
    environment: dict[str, str]
    s3: Any
    store_server: ThreadedMotoServer
    prefect_url: str
    mlflow_url: str

    def deal(self, *arguments: str) -> str:
        done = subprocess.run(
            [*DEAL, *arguments], env=self.environment, capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        if "--json" in arguments:
            require_described(command_of(arguments), json.loads(done.stdout))
        return done.stdout

    def up(self) -> None:
        """Start everything at the ports that it has had from the start."""
        ports = [str(urlsplit(url).port) for url in (self.prefect_url, self.mlflow_url)]
        self.deal("server", "up", "--prefect-port", ports[0], "--mlflow-port", ports[1], "--trainings", "2")

    def add_lineage(self, name: str, base: Path, tasks: list[str], **train: Any) -> None:
        values = {
            "lineage": name,
            "base_model": str(base),
            "tasks": tasks,
            "gate": NO_LIMITS,
            "train": {"max_steps": 2, "max_prompt_tokens": 192, "checkpoint_steps": 0, **train},
        }
        path = self.home / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        self.deal("lineage", "apply", str(path))

    def land(self, key: str, rows: list[dict[str, str]]) -> None:
        self.put(f"inbox/{key}", "".join(json.dumps(row) + "\n" for row in rows).encode())

    def put(self, key: str, body: bytes) -> None:
        self.s3.put_object(Bucket=BUCKET, Key=f"team/{key}", Body=body)

    def read(self, key: str) -> Any:
        return json.loads(self.s3.get_object(Bucket=BUCKET, Key=f"team/{key}")["Body"].read())

    def learned(self, lineage: str) -> list[str]:
        """Keys of the arrivals that became versions, in the versions' order."""
        order = {
            int(end.version): key
            for key, end in read_ended(self.store(), lineage).items()
            if end.version is not None and end.outcome in ("promoted", "rollout")
        }
        return [order[number] for number in sorted(order)]

    def versions(self, lineage: str) -> tuple[Version, ...]:
        return Versions(self.store()).all(lineage)

    def store(self) -> ObjectStore:
        names = ("STORE_URI", "S3_ENDPOINT_URL", "S3_REGION", "S3_ACCESS_KEY_ID", "S3_SECRET_ACCESS_KEY")
        values = {name.lower(): self.environment[f"DEAL_{name}"] for name in names}
        settings = StoreSettings.model_validate({"home": self.home, **values})
        return store_at(settings.store_uri, settings)

    def tracking(self) -> TrackingSettings:
        return TrackingSettings.model_validate({"home": self.home, "tracking_uri": self.mlflow_url})

    async def events(self, *names: str) -> Any:
        """Events of these names as the server takes them in."""
        wanted = EventFilter(event=EventNameFilter(name=[*names, HEARTBEAT]))
        async with PrefectEventSubscriber(api_url=f"{self.prefect_url}/api", filter=wanted) as events:
            async for event in events:
                yield event


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Whole]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=free_port(), verbose=False)
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
    ports = [free_port(), free_port(), free_port()]
    dropped = {"PREFECT_API_URL", "MLFLOW_TRACKING_URI"}
    environment = {name: value for name, value in os.environ.items() if name not in dropped} | {
        "DEAL_HOME": str(home),
        "DEAL_CACHE_DIR": str(home / "cache"),
        "DEAL_STORE_URI": f"s3://{BUCKET}/team",
        "DEAL_S3_ENDPOINT_URL": f"http://{host}:{port}",
        "DEAL_S3_REGION": "us-east-1",
        "DEAL_S3_ACCESS_KEY_ID": "somebody",
        "DEAL_S3_SECRET_ACCESS_KEY": SECRET,
        "DEAL_LANDING_QUEUE_URL": queue,
        "DEAL_LEASE_SECONDS": "60",
    }
    found = Whole(home, environment, s3, server, f"http://127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[1]}")
    with ExitStack() as stack:
        stack.callback(server.stop)
        if find_binaries():  # else both servers keep their data in SQLite
            address = stack.enter_context(running_postgres(ports[2], ("prefect", "mlflow")))
            environment["PREFECT_API_DATABASE_CONNECTION_URL"] = f"postgresql+asyncpg://{address}/prefect"
            environment["MLFLOW_TRACKING_URI"] = f"postgresql+psycopg2://{address}/mlflow"
        stack.callback(found.deal, "server", "down")
        found.up()
        yield found


def rows_of(task: str) -> list[dict[str, str]]:
    lines = (EXAMPLES / "parcels" / "messages.jsonl").read_text().splitlines()
    return [{**json.loads(line), "task": task} for line in lines]


def tree_of(home: Path) -> dict[int, str]:
    """Processes that `deal server up` started here, with all below them."""
    parts = json.loads((home / "stack.json").read_text())["parts"]
    found = {}
    for part in parts:
        root = psutil.Process(part["pid"])
        for process in (root, *root.children(recursive=True)):
            found[process.pid] = part["name"]
    return found


async def wait_until_learned(
    whole: Whole, wanted: dict[str, int], events: Any, seconds: float = WAIT_SECONDS
) -> list[Event]:
    """Look after every run that ends, and with every heartbeat, until each lineage has learned so many arrivals."""
    seen: list[Event] = []

    async def is_done() -> bool:
        counts = {name: len(await asyncio.to_thread(whole.learned, name)) for name in wanted}
        return counts == wanted

    async with asyncio.timeout(seconds):
        async for event in events:
            seen.append(event)
            if await is_done():
                return seen
    raise AssertionError("the server ended the stream")
