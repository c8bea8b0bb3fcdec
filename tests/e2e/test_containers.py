"""infra/docker in real containers: the commands of docs/compose.md, from a landed file to an answer and a restore."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest
import tenacity
import yaml
from botocore.exceptions import ClientError

from benchmarks.speed.real_engine import PROGRAM, SETTINGS
from benchmarks.tiny_base import NO_LIMITS, build_tiny_base
from infra.settings import StoreSettings
from infra.store.opening import store_at
from infra.store.provision import BUCKETS, policy_of
from infra.versions import Version, Versions
from tests.containers.daemon import docker, run
from tests.e2e.whole import rows_of

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "compose.md").read_text()
SENT = ("constraints.txt", "pyproject.toml", "prefect.yaml", "README.md", "LICENSE", ".dockerignore")
FOLDERS = ("deal_core", "deal_pipeline", "examples", "flows", "infra", "tasks")
FILES = "infra/docker/compose.yaml:ports.yaml"
LIBRARIES = PROGRAM.parents[1] / "lib" / "python3.11" / "site-packages"
"""vLLM's, which `make engine` installs; without them the last step is left out."""
WAIT_SECONDS = 900
HOME = "/var/lib/deal"
BASE = f"{HOME}/cache/tiny"
QUESTIONS = {"dataframe_records": [{"input": row["text"], "task": "parcels"} for row in rows_of("parcels")[:12]]}

pytestmark = [pytest.mark.e2e, pytest.mark.nightly(minutes=30)]


def blocks_of(heading: str) -> list[str]:
    """The commands below a heading of the page."""
    text = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    found = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert found, f"the page has no commands below {heading!r} any more"
    return found


def compose_lines(block: str) -> str:
    return "\n".join(line for line in block.splitlines() if line.startswith("docker compose"))


@dataclass
class Stack:
    """A copy of the project whose stack runs, and how to look into it."""

    folder: Path
    values: dict[str, str]
    environment: dict[str, str]

    def shell(self, commands: str) -> str:
        script = ("bash", "-euo", "pipefail", "-c", commands)
        return run(*script, cwd=self.folder, env=self.environment, timeout=2 * WAIT_SECONDS)

    def compose(self, *arguments: str) -> str:
        return run("docker", "compose", *arguments, cwd=self.folder, env=self.environment, timeout=WAIT_SECONDS)

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

    def versions(self) -> tuple[Version, ...]:
        values = {
            "s3_endpoint_url": f"http://{self.address('store', 9000)}",
            "s3_region": "us-east-1",
            "s3_access_key_id": self.values["STORE_WORKER_ACCESS_KEY"],
            "s3_secret_access_key": self.values["STORE_WORKER_SECRET_KEY"],
        }
        return Versions(store_at("s3://deal", StoreSettings.model_validate(values))).all("support")

    def address(self, service: str, port: int) -> str:
        return self.compose("port", service, str(port)).strip()

    def land(self, key: str, rows: list[dict[str, str]]) -> None:
        body = "".join(json.dumps(row) + "\n" for row in rows).encode()
        self.s3("worker").put_object(Bucket="deal", Key=f"inbox/{key}", Body=body)

    def ask(self, token: str) -> httpx.Response:
        headers = {"Authorization": f"Bearer {token}"}
        url = f"http://{self.address('front', 5001)}/invocations"
        return httpx.post(url, json=QUESTIONS, headers=headers, timeout=WAIT_SECONDS)

    def answers(self) -> list[dict[str, str]]:
        answer = self.ask(self.values["DEAL_SERVE_API_KEY"])
        assert answer.is_success, answer.text
        return list(answer.json()["predictions"])


@contextmanager
def logs_of_a_failure(stack: Stack) -> Iterator[None]:
    try:
        yield
    except BaseException:
        print(stack.compose("ps", "--all"), stack.compose("logs", "--no-color", "--tail", "60"))
        raise


def wait_for(is_so: Callable[[], bool]) -> None:
    """Look until it is so."""
    tenacity.Retrying(
        retry=tenacity.retry_if_result(lambda answer: not answer),
        stop=tenacity.stop_after_delay(WAIT_SECONDS),
        wait=tenacity.wait_fixed(2),
    )(is_so)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The stack of the page, started by its commands. The ports are free ones."""
    folder = tmp_path_factory.mktemp("containers") / "project"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".env"))
    for name in SENT:
        shutil.copy(ROOT / name, folder / name)
    example = (ROOT / "infra" / "docker" / "env.example").read_text()
    values = {name: secrets.token_hex(12) for name in re.findall(r"^(\w+)=change-me", example, re.MULTILINE)}
    values |= {"MLFLOW_ADMIN_USERNAME": "people", "MLFLOW_WORKER_USERNAME": "worker", "DEAL_LINEAGE": "support"}
    values |= {"PREFECT_AUTH": f"deal:{secrets.token_hex(12)}", "DEAL_SERVE_BASE": BASE}
    if list_of_wheels():  # pip takes torch for a CPU from there
        values["TORCH_INDEX"] = "https://pypi.org/simple"
    (folder / "infra" / "docker" / ".env").write_text("".join(f"{name}={value}\n" for name, value in values.items()))
    (folder / "ports.yaml").write_text(ports_and_times())
    build_tiny_base(folder / "tiny", width=128)  # as wide as vLLM demands
    with docker(with_engine=LIBRARIES.is_dir()):
        stack = Stack(folder, values, {**os.environ, "COMPOSE_FILE": FILES})
        try:
            with logs_of_a_failure(stack):
                stack.compose("build")
                stack.compose("up", "--detach", "--wait", "store")
                make_users_by_hand(stack)
                stack.shell(compose_lines(blocks_of("Start")[0]))
                stack.compose("cp", str(folder / "tiny"), f"worker-cpu:{BASE}")
                stack.compose("exec", "-T", "--user", "root", "worker-cpu", "chown", "-R", "deal:deal", BASE)
            yield stack
        finally:
            stack.compose("down", "--volumes", "--remove-orphans", "--timeout", "1")


def ports_and_times() -> str:
    """What the test changes in compose.yaml: free ports, and how soon a run goes on whose worker is gone.

    One thread each, because threads that wait for each other on a busy machine take a hundred times as long.
    """
    own = {"DEAL_LEASE_SECONDS": "60", "OMP_NUM_THREADS": "1", "DEAL_SERVING_PRECISION": "fp32"}  # as vLLM's below
    parts = {name: [f"environment: {json.dumps(own)}"] for name in ("worker-cpu", "worker-gpu", "front")}
    for name, port in {"store": 9000, "prefect": 4200, "mlflow": 5000, "front": 5001}.items():
        parts.setdefault(name, []).append(f'ports: !override ["127.0.0.1::{port}"]')
    return "\n".join(["services:", *(f"  {name}: {{{', '.join(values)}}}" for name, values in parts.items()), ""])


def engine_on_a_cpu() -> str:
    """What the test changes in compose.gpu.yaml."""
    gpu = yaml.safe_load((ROOT / "infra" / "docker" / "compose.gpu.yaml").read_text())
    command = [*gpu["services"]["engine"]["command"], "--max-model-len=512", "--enforce-eager", "--dtype=float32"]
    return f"""
services:
  worker-gpu: {{deploy: !reset null}}
  engine:
    deploy: !reset null
    command: {json.dumps(command)}
    environment: {json.dumps({**SETTINGS, "OMP_NUM_THREADS": "1"})}
    volumes: ["{LIBRARIES}:/opt/engine:ro"]
"""


def list_of_wheels() -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", "global.find-links"], capture_output=True, text=True, check=False
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
        "base_model": BASE,
        "tasks": ["parcels", "killed"],
        "gate": NO_LIMITS,
        "train": {"max_steps": 4, "max_prompt_tokens": 192, "checkpoint_steps": 0, **train},
    }
    stack.s3("worker").put_object(Bucket="deal", Key="lineages/support.yaml", Body=yaml.safe_dump(values).encode())


def test_the_stack_from_a_landed_file_to_a_restore(stack: Stack) -> None:
    """One test, as its steps share what it takes minutes to start, and build on what was learned before them."""
    with logs_of_a_failure(stack):
        check_a_landed_file_becomes_champion(stack)
        check_the_front_answers_and_has_no_right_that_it_does_not_need(stack)
        check_a_worker_is_killed_and_its_run_goes_on(stack)
        check_a_backup_in_an_empty_stack_answers_the_same(stack)
        if LIBRARIES.is_dir():
            check_vllm_behind_the_front_answers_the_same(stack)


def check_a_landed_file_becomes_champion(stack: Stack) -> None:
    add_lineage(stack)
    stack.land("parcels/may.jsonl", rows_of("parcels"))
    stack.compose("exec", "-T", "worker-cpu", "prefect", "deployment", "run", "watch-inbox/watch-inbox")
    wait_for(lambda: any("champion" in version.aliases for version in stack.versions()))
    user, password = stack.values["MLFLOW_WORKER_USERNAME"], stack.values["MLFLOW_WORKER_PASSWORD"]
    address, host = stack.address("mlflow", 5000), {"Host": "localhost:5000"}  # the server knows this name
    mlflow = httpx.Client(base_url=f"http://{address}", auth=(user, password), headers=host, timeout=60)

    def is_mirrored() -> bool:
        versions = mlflow.get("/api/2.0/mlflow/model-versions/search", params={"filter": "name='support'"})
        return versions.is_success and len(versions.json().get("model_versions", ())) == 1

    wait_for(is_mirrored)
    cached = "import os, flows, prefect; print(all(os.path.exists(module.__cached__) for module in (flows, prefect)))"
    assert stack.compose("exec", "-T", "worker-cpu", "python", "-c", cached) == "True\n", "each run would compile all"
    made = mlflow.post("/api/2.0/mlflow/users/create", json={"username": "other", "password": "long-enough-1"})
    assert made.status_code == 403, "the workers are no administrators of MLflow"


def check_the_front_answers_and_has_no_right_that_it_does_not_need(stack: Stack) -> None:
    stack.environment["COMPOSE_PROFILES"] = "serve"
    stack.shell(compose_lines(blocks_of("First adaptation")[1]))
    assert [answer["task"] for answer in stack.answers()] == ["parcels"] * 12
    assert stack.ask("another").status_code == 401
    for service, is_reached in (("store", True), ("prefect", False), ("mlflow", False), ("postgres", False)):
        look_up = f"getent hosts {service} >/dev/null && echo yes || echo no"
        assert stack.compose("exec", "-T", "front", "sh", "-c", look_up) == ("yes\n" if is_reached else "no\n")
    front, worker = stack.s3("front"), stack.s3("worker")
    worker.list_multipart_uploads(Bucket="deal")  # `deal data gc` looks for those of killed processes
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
    stack.land("killed/may.jsonl", rows_of("killed"))  # the run that looks at the inbox sees it
    checkpoint = f"ls {HOME}/work/support/*/checkpoints/checkpoint-*/COMPLETE"
    wait = f"until {checkpoint} >/dev/null 2>&1; do sleep 0.2; done"
    stack.compose("exec", "-T", "worker-gpu", "sh", "-c", wait)
    stack.compose("kill", "worker-gpu")
    stack.compose("up", "--detach", "--no-deps", "worker-gpu")
    wait_for(lambda: len(stack.versions()) == 2)
    newest = max(stack.versions(), key=lambda version: int(version.version))
    key = f"{newest.adapter_uri}/findings.json"
    findings = json.loads(stack.s3("worker").get_object(Bucket="deal", Key=key)["Body"].read())
    assert findings["training"]["resumed_from_step"] >= 20, "it went on from a checkpoint"


def check_a_backup_in_an_empty_stack_answers_the_same(stack: Stack) -> None:
    wait_for(lambda: {answer["version"] for answer in stack.answers()} == {"2"})
    # A version serves before its arrival is closed. A backup of that moment would hold an open arrival.
    wait_for(lambda: num_open(stack) == [0])
    before, versions = stack.answers(), stack.versions()
    for block in blocks_of("Backup and restore")[:2]:
        stack.shell(block)
    stack.compose("up", "--detach", "--wait", "--wait-timeout", str(WAIT_SECONDS), "--no-deps", "front")
    assert (stack.answers(), stack.versions()) == (before, versions)
    assert num_open(stack) == [0]


def num_open(stack: Stack) -> list[int]:
    """How many arrivals each lineage has open."""
    status = json.loads(stack.compose("exec", "-T", "worker-cpu", "deal", "status", "--json"))
    return [lineage["num_open"] for lineage in status["lineages"]]


def check_vllm_behind_the_front_answers_the_same(stack: Stack) -> None:
    before = stack.answers()
    (stack.folder / "engine.yaml").write_text(engine_on_a_cpu())
    stack.environment["COMPOSE_FILE"] = f"{FILES}:infra/docker/compose.gpu.yaml:engine.yaml"
    wait = ("--wait", "--wait-timeout", str(WAIT_SECONDS))
    stack.compose("up", "--detach", *wait, "--no-deps", "front", "engine")
    assert stack.answers() == before
    reaching = "python3 -c 'import socket; socket.create_connection((\"engine\", 8000), 5)' && echo yes || echo no"
    assert stack.compose("exec", "-T", "front", "sh", "-c", reaching) == "yes\n"
    assert stack.compose("exec", "-T", "worker-cpu", "sh", "-c", reaching) == "no\n"
