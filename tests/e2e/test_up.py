"""`deal server up` with real servers and workers, the store behind S3, and landings through SQS."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import httpx
import psutil
import pytest
import tenacity
from playwright.sync_api import sync_playwright

from tests.e2e.command import DEAL
from tests.e2e.whole import BUCKET, CRASHED, DONE, SECRET, WAIT_SECONDS, Whole, rows_of, tree_of, wait_until_learned
from tests.registering import mlflow_run

CHROMIUM = shutil.which("chromium")
NUM_ARRIVALS = 4


@pytest.mark.e2e
def test_a_landed_file_becomes_champion_by_itself(whole: Whole, tiny_base: Path) -> None:
    whole.add_lineage("early", tiny_base, ["parcels-early"])

    async def landing() -> None:
        waiting = asyncio.create_task(wait_until_learned(whole, {"early": 1}, whole.events(DONE)))
        await asyncio.sleep(0)  # the stream is open before anything lands
        whole.land("parcels-early/0.jsonl", rows_of("parcels"))
        await waiting

    asyncio.run(landing())
    (version,) = whole.versions("early")
    assert "champion" in version.aliases
    check_status_shows_the_whole(whole, "early")
    check_no_secret_is_in_any_log_artifact_or_record(whole)
    check_pages_of_others_cannot_command_the_server(whole)
    check_everything_listens_on_loopback_alone(whole)
    check_a_second_up_is_refused(whole)


@pytest.mark.e2e
@pytest.mark.nightly(minutes=4)
def test_the_whole(whole: Whole, tiny_base: Path) -> None:
    """One test, as its steps share what it takes a minute to bring up, and build on what was learned before them."""
    check_what_lands_is_adapted_once_in_order_and_two_lineages_at_once(whole, tiny_base)
    if CHROMIUM:  # apt-get install chromium
        check_both_pages_show_a_finished_adaptation(whole)
    check_a_training_that_is_killed_goes_on_and_is_registered_once(whole, tiny_base)
    check_no_secret_is_in_any_log_artifact_or_record(whole)
    check_a_server_that_is_killed_is_started_again(whole)
    check_status_shows_the_whole(whole, "one", "two", "three")


def check_what_lands_is_adapted_once_in_order_and_two_lineages_at_once(whole: Whole, tiny_base: Path) -> None:
    rows = rows_of("parcels")
    for name in ("one", "two"):
        whole.add_lineage(name, tiny_base, [f"parcels-{name}"])
    size = len(rows) // NUM_ARRIVALS

    async def landing() -> None:
        events = whole.events(DONE)
        waiting = asyncio.create_task(wait_until_learned(whole, {"one": NUM_ARRIVALS, "two": 2}, events))
        await asyncio.sleep(0)  # the stream is open before anything lands
        for number in range(NUM_ARRIVALS):
            whole.land(f"parcels-one/{number}.jsonl", rows[number * size : (number + 1) * size])
            if number < 2:
                whole.land(f"parcels-two/{number}.jsonl", rows[number * size : (number + 1) * size])
        whole.land("parcels-one/again.jsonl", rows[:size])  # the first one's bytes under another name
        await waiting

    asyncio.run(landing())
    for name, count in (("one", NUM_ARRIVALS), ("two", 2)):
        versions = whole.versions(name)
        assert [version.parent_version for version in versions] == [None, *map(str, range(1, count))], "one line"
        assert whole.learned(name) == [f"inbox/parcels-{name}/{number}.jsonl" for number in range(count)]
    one, two = whole.versions("one"), whole.versions("two")
    assert two[0].created < one[-1].created, "the second lineage did not wait for the first one's end"


def check_both_pages_show_a_finished_adaptation(whole: Whole) -> None:
    version = whole.versions("one")[-1]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(f"{whole.prefect_url}/runs")
        page.get_by_text("adapt-landed-one").first.wait_for()
        page.get_by_text("adapt-one-parcels-one").first.wait_for()
        page.goto(f"{whole.mlflow_url}/#/models/one")
        page.get_by_text("@ champion").first.wait_for()
        page.goto(f"{whole.mlflow_url}/#/models/one/versions/{version.version}")
        page.get_by_text("parcels-one").first.wait_for()
        run = mlflow_run("one", version.run_key, whole.tracking()).info
        page.goto(f"{whole.mlflow_url}/#/experiments/{run.experiment_id}/runs/{run.run_id}/artifacts")
        page.get_by_text("evaluation.json").first.wait_for()
        browser.close()


def check_a_training_that_is_killed_goes_on_and_is_registered_once(whole: Whole, tiny_base: Path) -> None:
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


def check_status_shows_the_whole(whole: Whole, *lineages: str) -> None:
    status = json.loads(whole.deal("status", "--json"))
    assert [part["is_alive"] for part in status["parts"]] == [True] * 5
    num_open = {each["lineage"]: each["num_open"] for each in status["lineages"]}
    assert [num_open[name] for name in lineages] == [0] * len(lineages)


def check_no_secret_is_in_any_log_artifact_or_record(whole: Whole) -> None:
    secret = SECRET.encode()
    files = [path for path in whole.home.rglob("*") if path.is_file()]
    assert {"worker-deal-gpu.log", "stack.json", "adapter_model.safetensors"} <= {path.name for path in files}
    assert [path for path in files if secret in path.read_bytes()] == []
    for page in whole.s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET):
        for item in page["Contents"]:
            assert secret not in whole.s3.get_object(Bucket=BUCKET, Key=item["Key"])["Body"].read(), item["Key"]
    token = httpx.get(f"{whole.prefect_url}/api/csrf-token", params={"client": "tests"}).json()["token"]
    headers = {"Prefect-Csrf-Token": token, "Prefect-Csrf-Client": "tests"}
    for kind in ("flow_runs", "logs"):
        answer = httpx.post(f"{whole.prefect_url}/api/{kind}/filter", json={}, headers=headers)
        assert answer.is_success and answer.json() and secret not in answer.content


def check_pages_of_others_cannot_command_the_server(whole: Whole) -> None:
    """A page can send a POST without being asked for its origin first, if it has no content type."""
    flows, stranger = f"{whole.prefect_url}/api/flows/", {"Origin": "https://elsewhere.example"}
    answer = httpx.post(flows, content=b'{"name": "theirs"}', headers=stranger)
    assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers
    assert "access-control-allow-origin" not in httpx.get(f"{whole.prefect_url}/api/health", headers=stranger).headers


def check_a_server_that_is_killed_is_started_again(whole: Whole) -> None:
    def pid_of(name: str) -> int:
        parts = json.loads((whole.home / "stack.json").read_text())["parts"]
        return next(part["pid"] for part in parts if part["name"] == name)

    before = pid_of("mlflow-server")
    os.kill(before, signal.SIGKILL)
    for attempt in tenacity.Retrying(wait=tenacity.wait_fixed(0.5), stop=tenacity.stop_after_delay(WAIT_SECONDS)):
        with attempt:
            assert pid_of("mlflow-server") != before
            assert httpx.get(f"{whole.mlflow_url}/health").is_success
    assert len(whole.versions("one")) == NUM_ARRIVALS


def check_everything_listens_on_loopback_alone(whole: Whole) -> None:
    mine = set(tree_of(whole.home))
    listening = {c.laddr.ip for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.pid in mine}
    assert listening and listening <= {"127.0.0.1", "::1"}


def check_a_second_up_is_refused(whole: Whole) -> None:
    again = subprocess.run([*DEAL, "server", "up"], env=whole.environment, capture_output=True, text=True, check=False)
    assert again.returncode == 2 and "up already" in again.stderr + again.stdout
