"""Two processes that change the state of one lineage at once, in a folder and on an S3 server: no change is lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from infra.lineage_state import read_state, update
from infra.settings import StoreSettings
from infra.store.base import ObjectStore
from infra.store.opening import store_at
from infra.store.s3 import make_client
from tests.arriving import state_with

SOME_AND_MANY = [10, pytest.param(200, marks=pytest.mark.nightly(minutes=3))]
"""Changes of each process."""
ADD_LABELS = """
import sys
from infra.lineage_state import update
from infra.store.opening import store_at

store, name, number = store_at(sys.argv[1]), sys.argv[2], int(sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
for label in range(number):
    update(store, "l", lambda state: state.model_copy(
        update={"labels": {**state.labels, "bank": (*state.labels.get("bank", ()), f"{name}{label}")}}
    ))
"""
CLAIM = """
import sys, uuid
from datetime import UTC, datetime
from functools import partial
from infra.lineage_state import update
from infra.store.opening import store_at
from tasks.arrival_queue import Result, claim, finish
from tasks.lineage.retrain import RetrainPolicy

store, policy, now = store_at(sys.argv[1]), RetrainPolicy(), datetime.now(UTC)
print("ready", flush=True)
sys.stdin.readline()
while True:
    new_id = uuid.uuid4().hex
    state = update(store, "l", partial(claim, policy=policy, now=now, spent_hours=lambda _: 0.0, new_id=new_id))
    batch = state.batch(new_id)
    if batch is not None:
        print(*batch.files, flush=True)
        state = update(store, "l", partial(finish, id_=new_id, result=Result("promoted", ""), now=now, arrivals={}))
    if not state.arrivals:
        break
"""


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    if request.param == "file":
        return store_at(str(tmp_path / "store"))
    for name, value in {
        "ENDPOINT_URL": request.getfixturevalue("s3_server"),
        "REGION": "us-east-1",
        "ACCESS_KEY_ID": "somebody",
        "SECRET_ACCESS_KEY": "secret",
    }.items():
        monkeypatch.setenv(f"DEAL_S3_{name}", value)
    make_client(StoreSettings()).create_bucket(Bucket="states")
    return store_at("s3://states/team")


def run_two(store: ObjectStore, script: str, *arguments: str) -> list[str]:
    """Let two processes run a script at the same time; return what they print."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, store.uri, name, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=dict(os.environ),
        )
        for name in "ab"
    ]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    printed = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    return [line for text in printed for line in text.splitlines()]


@pytest.mark.parametrize("number", SOME_AND_MANY)
def test_of_two_processes_that_change_a_state_at_once_no_change_is_lost(store: ObjectStore, number: int) -> None:
    run_two(store, ADD_LABELS, str(number))
    labels = read_state(store, "l").labels["bank"]
    assert sorted(labels) == sorted(f"{name}{place}" for name in "ab" for place in range(number))
    assert [label for label in labels if label[0] == "a"] == [f"a{place}" for place in range(number)]


@pytest.mark.parametrize("number", SOME_AND_MANY)
def test_of_two_processes_that_claim_at_once_none_gets_a_batch_of_the_other(store: ObjectStore, number: int) -> None:
    keys = [f"inbox/bank/{place:03d}.csv" for place in range(2 * number)]
    update(store, "l", lambda _: state_with(*keys))
    assert sorted(run_two(store, CLAIM)) == keys
    assert read_state(store, "l").batches == ()
