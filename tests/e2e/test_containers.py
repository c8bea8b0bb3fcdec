"""infra/docker in real containers: the commands of docs/compose.md, from a landed file to an answer and a restore."""

from __future__ import annotations

import json
import re
import secrets
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest
import tenacity
import yaml
from botocore.exceptions import ClientError

from benchmarks.tiny_base import NO_LIMITS
from infra.store.provision import BUCKETS, policy_of
from tests.containers.daemon import docker, run
from tests.e2e.whole import rows_of

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "compose.md").read_text()
SENT = ("constraints.txt", "pyproject.toml", "prefect.yaml", "README.md", "LICENSE", ".dockerignore")
FOLDERS = ("deal_core", "deal_pipeline", "examples", "flows", "infra", "tasks")
WAIT_SECONDS = 900
HOME = "/var/lib/deal"
QUESTION = {"dataframe_records": [{"input": "Where is my parcel?", "task": "parcels"}]}

pytestmark = [pytest.mark.e2e, pytest.mark.nightly(minutes=30)]


def blocks_of(heading: str) -> list[str]:
    """The commands below a heading of the page."""
    text = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    found = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert found, f"the page has no commands below {heading!r} any more"
    return found


@dataclass
class Stack:
    """A copy of the project whose stack runs, and how to look into it."""

    folder: Path
    values: dict[str, str]

    def shell(self, commands: str) -> str:
        return run("bash", "-euo", "pipefail", "-c", commands, cwd=self.folder, timeout=2 * WAIT_SECONDS)

    def compose(self, *arguments: str) -> str:
        return run("docker", "compose", *arguments, cwd=self.folder, timeout=WAIT_SECONDS)

    def deal(self, *arguments: str) -> Any:
        return json.loads(self.compose("exec", "-T", "worker-cpu", "deal", *arguments, "--json"))

    def s3(self, user: str) -> Any:
        """A client with the keys of a user; of the administrator, if it is empty."""
        prefix = f"STORE_{user.upper()}_" if user else "STORE_"
        return boto3.client(
            "s3",
            endpoint_url=f"http://{self.address('store', 9000)}",
            region_name="us-east-1",
            aws_access_key_id=self.values[f"{prefix}ACCESS_KEY"],
            aws_secret_access_key=self.values[f"{prefix}SECRET_KEY"],
        )

    def address(self, service: str, port: int) -> str:
        return self.compose("port", service, str(port)).strip()

    def land(self, key: str, rows: list[dict[str, str]]) -> None:
        body = "".join(json.dumps(row) + "\n" for row in rows).encode()
        self.s3("worker").put_object(Bucket="deal", Key=f"inbox/{key}", Body=body)
        self.compose("exec", "-T", "worker-cpu", "prefect", "deployment", "run", "watch-inbox/watch-inbox")

    def ask(self, token: str) -> httpx.Response:
        headers = {"Authorization": f"Bearer {token}"}
        url = f"http://{self.address('front', 5001)}/invocations"
        return httpx.post(url, json=QUESTION, headers=headers, timeout=120)

    def versions(self) -> list[dict[str, Any]]:
        return list(self.deal("version", "list", "--lineage", "support")["versions"])

    def logs(self) -> str:
        return self.compose("logs", "--no-color", "--tail", "40")


def wait_for(is_so: Callable[[], bool], stack: Stack) -> None:
    """Look until it is so."""
    for attempt in tenacity.Retrying(
        stop=tenacity.stop_after_delay(WAIT_SECONDS), wait=tenacity.wait_fixed(2), reraise=True
    ):
        with attempt:
            assert is_so(), stack.logs()


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Iterator[Stack]:
    """The stack of the page, started by its commands. The ports are free ones."""
    folder = tmp_path_factory.mktemp("containers") / "project"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".env"))
    for name in SENT:
        shutil.copy(ROOT / name, folder / name)
    example = (ROOT / "infra" / "docker" / "env.example").read_text()
    values = {name: secrets.token_hex(12) for name in re.findall(r"^(\w+)=change-me", example, re.MULTILINE)}
    values |= {"MLFLOW_ADMIN_USERNAME": "people", "MLFLOW_WORKER_USERNAME": "worker", "DEAL_LINEAGE": "support"}
    values["PREFECT_AUTH"] = f"deal:{values.pop('PREFECT_AUTH', secrets.token_hex(12))}"
    if list_of_wheels():  # pip takes torch for a CPU from there
        values["TORCH_INDEX"] = "https://pypi.org/simple"
    (folder / "infra" / "docker" / ".env").write_text("".join(f"{name}={value}\n" for name, value in values.items()))
    ports = {"store": 9000, "prefect": 4200, "mlflow": 5000, "front": 5001}
    lines = [f'  {name}: {{ports: !override ["127.0.0.1::{port}"]}}\n' for name, port in ports.items()]
    (folder / "ports.yaml").write_text("".join(["services:\n", *lines]))
    with docker(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPOSE_FILE", "infra/docker/compose.yaml:ports.yaml")
        patch.setenv("COMPOSE_PROFILES", "serve")
        stack = Stack(folder, values)
        try:
            stack.compose("build")
            stack.compose("up", "--detach", "--wait", "store")
            make_users_by_hand(stack)
            start = [line for line in blocks_of("Start")[0].splitlines() if line.startswith("docker compose")]
            stack.shell("\n".join(line.replace("deal status", "true") for line in start))
            stack.compose("exec", "-T", "worker-cpu", "mkdir", "-p", f"{HOME}/cache")
            stack.compose("cp", str(tiny_base), f"worker-cpu:{HOME}/cache/tiny")
            yield stack
        except BaseException:
            print(stack.logs())
            raise
        finally:
            stack.compose("down", "--volumes", "--timeout", "30")


def list_of_wheels() -> str:
    done = subprocess.run(
        ["python", "-m", "pip", "config", "get", "global.find-links"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def make_users_by_hand(stack: Stack) -> None:
    """Users and rights on a server that has no administration like RustFS's: Ceph's gateway."""
    for user in BUCKETS:
        keys = [stack.values[f"STORE_{user.upper()}_{name}_KEY"] for name in ("ACCESS", "SECRET")]
        command = ["radosgw-admin", "-c", "/data/ceph.conf", "user", "create", f"--uid={user}", "--display-name=-"]
        stack.compose("exec", "-T", "store", *command, f"--access-key={keys[0]}", f"--secret-key={keys[1]}")
    admin = stack.s3("")
    for bucket in {*BUCKETS.values()}:
        admin.create_bucket(Bucket=bucket)
        statements = [
            {**statement, "Principal": {"AWS": [f"arn:aws:iam:::user/{user}"]}}
            for user in BUCKETS
            if BUCKETS[user] == bucket
            for statement in policy_of(user)["Statement"]
        ]
        policy = {"Version": "2012-10-17", "Statement": statements}
        admin.put_bucket_policy(Bucket=bucket, Policy=json.dumps(policy))


def add_lineage(stack: Stack, **train: Any) -> None:
    values = {
        "lineage": "support",
        "base_model": f"{HOME}/cache/tiny",
        "tasks": ["parcels", "killed"],
        "gate": NO_LIMITS,
        "train": {"max_steps": 4, "max_prompt_tokens": 192, "checkpoint_steps": 0, **train},
    }
    stack.s3("worker").put_object(Bucket="deal", Key="lineages/support.yaml", Body=yaml.safe_dump(values).encode())


def test_the_stack_from_a_landed_file_to_a_restore(stack: Stack) -> None:
    """One test, as its steps share what it takes minutes to start, and build on what was learned before them."""
    check_a_landed_file_becomes_champion(stack)
    check_the_front_answers_and_has_no_right_that_it_does_not_need(stack)
    check_a_worker_is_killed_and_its_run_goes_on(stack)
    check_a_backup_in_an_empty_stack_answers_the_same(stack)


def check_a_landed_file_becomes_champion(stack: Stack) -> None:
    add_lineage(stack)
    stack.land("parcels/may.jsonl", rows_of("parcels"))
    wait_for(lambda: any("champion" in version["aliases"] for version in stack.versions()), stack)
    user, password = stack.values["MLFLOW_WORKER_USERNAME"], stack.values["MLFLOW_WORKER_PASSWORD"]
    mlflow = httpx.Client(base_url=f"http://{stack.address('mlflow', 5000)}", auth=(user, password), timeout=60)

    def is_mirrored() -> bool:
        url = "/api/2.0/mlflow/registered-models/get"
        return mlflow.get(url, params={"name": "support"}).is_success

    wait_for(is_mirrored, stack)
    made = mlflow.post("/api/2.0/mlflow/users/create", json={"username": "other", "password": "long-enough-1"})
    assert made.status_code == 403, "the workers are no administrators of MLflow"


def check_the_front_answers_and_has_no_right_that_it_does_not_need(stack: Stack) -> None:
    stack.compose("up", "--detach", "--wait", "--wait-timeout", str(WAIT_SECONDS), "--no-deps", "front")
    answer = stack.ask(stack.values["DEAL_SERVE_API_KEY"])
    assert answer.is_success and answer.json()["predictions"], answer.text
    assert stack.ask("another").status_code == 401
    for service, is_reached in (("store", True), ("prefect", False), ("mlflow", False), ("postgres", False)):
        look_up = f"getent hosts {service} >/dev/null && echo yes || echo no"
        assert stack.compose("exec", "-T", "front", "sh", "-c", look_up) == ("yes\n" if is_reached else "no\n")
    front, worker = stack.s3("front"), stack.s3("worker")
    refused: list[Callable[[], Any]] = [
        lambda: front.put_object(Bucket="deal", Key="promotions/support/00000099.json", Body=b""),
        lambda: front.delete_object(Bucket="deal", Key="lineages/support.yaml"),
        lambda: front.get_object(Bucket="deal", Key="inbox/parcels/may.jsonl"),
        lambda: front.list_objects_v2(Bucket="mlflow"),
        lambda: worker.list_objects_v2(Bucket="mlflow"),
        lambda: worker.delete_bucket_policy(Bucket="deal"),
    ]
    for request in refused:
        with pytest.raises(ClientError) as raised:
            request()
        assert raised.value.response["Error"]["Code"] == "AccessDenied"


def check_a_worker_is_killed_and_its_run_goes_on(stack: Stack) -> None:
    add_lineage(stack, max_steps=400, checkpoint_steps=20)
    stack.land("killed/may.jsonl", rows_of("killed"))

    def has_checkpoint() -> bool:
        look = f"ls {HOME}/work/support/*/checkpoints/checkpoint-*/COMPLETE 2>/dev/null || true"
        return bool(stack.compose("exec", "-T", "worker-gpu", "sh", "-c", look))

    wait_for(has_checkpoint, stack)
    stack.compose("kill", "worker-gpu")
    stack.compose("up", "--detach", "--no-deps", "worker-gpu")
    wait_for(lambda: len(stack.versions()) == 2, stack)
    newest = max(stack.versions(), key=lambda version: int(version["version"]))
    key = f"{newest['adapter_uri']}/findings.json"
    findings = json.loads(stack.s3("worker").get_object(Bucket="deal", Key=key)["Body"].read())
    assert findings["training"]["resumed_from_step"] >= 20, "it went on from a checkpoint"


def check_a_backup_in_an_empty_stack_answers_the_same(stack: Stack) -> None:
    token = stack.values["DEAL_SERVE_API_KEY"]
    before, versions = stack.ask(token).json()["predictions"], stack.versions()
    backup, restore = blocks_of("Backup and restore")[:2]
    stack.shell(backup)
    stack.shell(restore)
    stack.compose("up", "--detach", "--wait", "--wait-timeout", str(WAIT_SECONDS), "--no-deps", "front")
    assert stack.ask(token).json()["predictions"] == before
    assert stack.versions() == versions
    status = stack.deal("status")
    assert [each["num_open"] for each in status["lineages"]] == [0]
