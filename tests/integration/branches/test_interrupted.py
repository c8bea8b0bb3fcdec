"""Relearning is interrupted at random moments, while a client asks the deleted texts all the time."""

from __future__ import annotations

import itertools
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pyarrow.parquet as pq
import pytest

from benchmarks.speed.serving import served
from deal_core.adapter.state import kept_of_tasks
from deal_core.errors import DealError
from deal_core.strategies.kept_rows import rows_name
from infra.branches import Branches
from infra.predictions import read_predictions
from infra.promotions import PromotionLog
from infra.store.opening import open_store
from infra.versions import Versions
from tasks.lineage.history import find_version
from tasks.lineage.promotion import promote_to, roll_back
from tests.conftest import MakeOnce
from tests.e2e.command import command, environment
from tests.integration.branches.conftest import adapter, champion, learn_tasks
from tests.integration.conftest import NO_MLFLOW

LONGEST_WAIT = 600.0
NUM_MOMENTS = 3
SEEDS = (0, 1, 7, 8)
"""Together twelve moments, with every point and every action. After the last seed's, the branch is given up."""
DEAL = (
    sys.executable,
    "-c",
    "import infra.log_batches; infra.log_batches.BATCH_SECONDS = 1.0; from deal_pipeline.cli.app import main; main()",
)
"""`deal`, whose servers store what they answered every second. A deletion waits for two of these pauses, twice."""
NUM_TEXTS = 3
"""The deleted texts that the client asks, one after another."""
KEY = "inbox/beds/a.jsonl"
WORDS = ("data", "delete", KEY, "--relearn", "--lineage", "l", "--yes")

pytestmark = pytest.mark.usefixtures("prefect_api", "learned")


@pytest.fixture(scope="session")
def without_beds(tiny_base: Path, home_made_once: MakeOnce) -> Path:
    """A home whose lineage `l` never saw beds."""
    return home_made_once("without-beds", lambda folder: learn_tasks(folder, tiny_base, ("taps", "cars")))


@pytest.fixture(autouse=True)
def short_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let servers and commands be `DEAL`."""
    for module in ("benchmarks.speed.serving", "tests.e2e.command"):
        monkeypatch.setattr(f"{module}.DEAL", DEAL)


def stored(folder: str) -> list[str]:
    return [info.key for info in open_store().list(folder)]


POINTS: dict[str, Callable[[], object]] = {
    "the branch is stored": lambda: stored("branches/l"),
    "the digests of the inputs are stored": lambda: stored("deleted_inputs"),
    "the tombstone is stored": lambda: stored("forgotten"),
    "the file has left the inbox": lambda: not open_store().exists(KEY),
    "a run has begun": lambda: len(stored("runs/l")) > 3,
    "a version is registered": lambda: Versions(open_store()).find("l", "4"),
    "the new version is champion": lambda: any(move.branch for move in PromotionLog(open_store()).moves("l")),
    "an adapter is noted as removed": lambda: any(key.endswith(".removed.json") for key in stored("versions/l")),
}
"""Where a relearning can be, in this order."""
ACTIONS = ("kill -9", "Ctrl-C", "rollback", "promote")


def start(home: Path, *words: str) -> subprocess.Popen[bytes]:
    with (home.parent / "commands.log").open("ab") as log:
        variables = environment(MLFLOW_TRACKING_URI=NO_MLFLOW)
        return subprocess.Popen(command(home, *words), cwd=home.parent, env=variables, stdout=log, stderr=log)


def move_by_hand(chance: random.Random, action: str) -> None:
    """What a person does while the relearning runs. It may be refused, as versions lose their adapters."""
    with suppress(DealError):
        if action == "rollback":
            roll_back(open_store(), "l", chance.choice(("1", "2")), who="a person", why="a test")
        else:
            roll_back(open_store(), "l", "2", who="a person", why="a test")
            promote_to(open_store(), "l", "3", who="a person", why="a test")


def go_back() -> None:
    """Make the champion of before the branch champion again, or what the branch made if its adapter is gone."""
    try:
        roll_back(open_store(), "l", "3", who="a person", why="the branch goes on")
    except DealError:
        roll_back(open_store(), "l", "4", who="a person", why="the branch goes on")


def interrupt(home: Path, chance: random.Random, point: str, action: str) -> None:
    """Start the command, and do something once it has come to a point."""
    process, began = start(home, *WORDS), time.monotonic()
    while not POINTS[point]() and process.poll() is None:
        assert time.monotonic() < began + LONGEST_WAIT
        time.sleep(0.005)
    if action == "kill -9":
        process.kill()
    elif action == "Ctrl-C":
        process.send_signal(signal.SIGINT)
    else:
        move_by_hand(chance, action)
    process.wait(LONGEST_WAIT)


@contextmanager
def asking(url: str, texts: list[str]) -> Iterator[None]:
    """Ask texts as rows of two tasks again and again. The champion may know one of them alone, or nobody answers."""
    stopped, answers = threading.Event(), list[int]()

    def ask() -> None:
        for text, task in itertools.cycle(itertools.product(texts, ("beds", "taps"))):
            if stopped.wait(0.1):
                return
            with suppress(httpx.HTTPError):
                row = {"input": text, "task": task}
                answers.append(httpx.post(f"{url}/invocations", json={"dataframe_records": [row]}).status_code)

    client = threading.Thread(target=ask)
    client.start()
    try:
        yield
    finally:
        stopped.set()
        client.join()
    assert 200 in answers


def wait_until_logged(url: str, text: str) -> None:
    """Ask a text until the log has it: what was answered before is stored then."""
    began = time.monotonic()
    while text not in set(read_predictions(open_store(), "l")["input"]):
        assert time.monotonic() < began + LONGEST_WAIT
        httpx.post(f"{url}/invocations", json={"dataframe_records": [{"input": text, "task": "taps"}]})
        time.sleep(0.2)


def holding(home: Path, texts: list[str]) -> dict[str, list[str]]:
    """The files of a home with one of the texts, in their bytes or, in Parquet, in their rows."""
    found = {}
    for path in home.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            if path.suffix == ".parquet":
                content += json.dumps(pq.read_table(path).to_pylist(), default=str).encode()
            if left := [text for text in texts if text.encode() in content]:
                found[str(path)] = left
    return found


@pytest.mark.nightly(minutes=4)
@pytest.mark.parametrize("seed", SEEDS)
def test_it_ends_as_a_lineage_that_never_saw_the_arrival_or_says_that_it_did_not(
    seed: int, home: Path, three_tasks: Path, without_beds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in home.glob("*.jsonl"):  # the versions name those of the home that this one is a copy of
        file.unlink()
    store, content = open_store(), (three_tasks / "beds.jsonl").read_bytes()
    store.put_bytes(KEY, content)
    texts = [json.loads(line)["text"] for line in content.splitlines()]
    chance = random.Random(seed)
    points = sorted(chance.sample(range(len(POINTS)), NUM_MOMENTS))
    moments = [([*POINTS][point], chance.choice(ACTIONS)) for point in points]
    is_given_up = chance.random() < 0.25
    print(f"seed {seed}: {moments}, then {'given up' if is_given_up else 'to the end'}")

    assert {Path(file).name for file in holding(home, texts)} >= {"a.jsonl", "test.parquet"}, "it finds rows"
    serving = environment(DEAL_HOME=str(home), MLFLOW_TRACKING_URI=NO_MLFLOW, DEAL_LOG_PREDICTIONS="texts")
    with served("l", serving) as (url, _), asking(url, texts[:NUM_TEXTS]):
        wait_until_logged(url, texts[0])
        for point, action in moments:
            interrupt(home, chance, point, action)
            if champion().version in ("1", "2") and Branches(store).open("l") is not None:
                go_back()
        code = start(home, "lineage", "branch", "l", "--give-up").wait(LONGEST_WAIT) if is_given_up else 1
        if code != 0:  # it has been swapped in, or has ended
            assert start(home, *WORDS).wait(LONGEST_WAIT) == 0, (home.parent / "commands.log").read_text()
        wait_until_logged(url, "after the deletion")
    # The server has ended, so everything that it answered is stored.
    first, *_ = Branches(store).all("l")
    assert first.end is not None and Branches(store).open("l") is None
    if stored("forgotten"):
        assert holding(home, texts) == {}
        for adapter_folder in {file.parent for file in (home / "store" / "adapters").rglob("method.json")}:
            assert not kept_of_tasks(adapter_folder).get(rows_name("beds")), "nor as tokens"

    if first.end.outcome == "given up":
        assert first.end.attestation is None and champion().version in ("3", "4"), "4: a person has moved it there"
        return
    assert first.end.attestation is not None and first.end.attestation.unknown == ()
    relearned = adapter(find_version(store, "l", first.end.tip))
    assert champion().version in (first.end.tip, "1"), "a person may have gone back to the root"
    monkeypatch.setenv("DEAL_HOME", str(without_beds))
    assert adapter(champion()) == relearned
