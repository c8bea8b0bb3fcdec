"""Clients that never stop asking while the champion moves: does a request fail, and is every answer its version's?

    python -m benchmarks.serving --out benchmarks/results/serving.json

Two versions are learned from examples/, `deal serve` is started, and clients ask it for two minutes while the alias
moves back (a rollback) and forth. An answer is right when it is what the version that it names gives when it is asked
alone, and when no request that was sent after a version took over is answered by the one before. How long a move took
is counted from the alias to the first answer of the new version. Memory is that of the server and its children, with
shared pages counted once. Served is in fp32: in bf16 the rounding of a batch tips answers that hang in the balance, so
that "what it gives alone" is no exact measure.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.output import DEAL, write_result
from benchmarks.tiny_base import EXAMPLES, NO_LIMITS, build_tiny_base
from infra.tracking.registry import open_registry

LINEAGE = "served"
TASKS: tuple[Mapping[str, Any], ...] = (
    {"name": "bank", "data": str(EXAMPLES / "bank/train.jsonl"), "test_data": str(EXAMPLES / "bank/test.jsonl")},
    {"name": "clinic", "data": str(EXAMPLES / "clinic/train.csv"), "test_data": str(EXAMPLES / "clinic/test.csv"),
     "columns": {"text": "note", "label": "finding"}},
)  # fmt: skip
MOVE_SECONDS = 300.0
"""A move that takes longer is given up."""
MEMORY_SECONDS = 0.25
"""Between two looks at the memory."""

Expected = Mapping[str, Sequence[str]]
"""What each version answers to each of the texts."""


@dataclass(frozen=True)
class Answered:
    """One request: when it was sent and answered, by whom, and what was wrong with it (None: nothing)."""

    sent: float
    answered: float
    version: str | None
    problem: str | None


@dataclass
class Clients:
    """Threads that ask without a pause, each on a connection of its own."""

    url: str
    texts: Sequence[str]
    task: str
    expected: Expected
    answers: list[Answered] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def asking(self, num_clients: int) -> Iterator[None]:
        """Ask while the block runs; the last requests are answered before it ends."""
        threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(num_clients)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()

    def first_of(self, version: str, since: float, sent_since: float = 0.0) -> float:
        """Seconds from `since` to the first answer of a version, waited for, to a request sent after `sent_since`."""
        while time.monotonic() - since < MOVE_SECONDS:
            times = [each.answered for each in list(self.answers)
                     if each.version == version and each.answered > since and each.sent > sent_since]  # fmt: skip
            if times:
                return min(times) - since
            time.sleep(0.02)
        raise TimeoutError(f"no answer of version {version} within {MOVE_SECONDS:.0f} s")

    def _ask(self, number: int) -> None:
        place = number
        with httpx.Client(timeout=300) as client:
            while not self._stop.is_set():
                place = (place + 1) % len(self.texts)
                row = {"input": self.texts[place], "task": self.task}
                sent = time.monotonic()
                try:
                    response = client.post(f"{self.url}/invocations", json={"dataframe_records": [row]})
                    version, problem = self._check(response, place)
                except httpx.HTTPError as error:
                    version, problem = None, f"{type(error).__name__}: {error}"
                self.answers.append(Answered(sent, time.monotonic(), version, problem))

    def _check(self, response: httpx.Response, place: int) -> tuple[str | None, str | None]:
        if response.status_code != 200:
            return None, f"{response.status_code}: {response.text[:200]}"
        (answer,) = response.json()["predictions"]
        version = str(answer["version"])
        if response.headers["X-Deal-Version"] != version:
            return version, f"the header names version {response.headers['X-Deal-Version']}, the answer {version}"
        wanted = self.expected[version][place]
        if answer["output"] != wanted:
            return version, f"version {version} answers {wanted!r} to {self.texts[place]!r}, got {answer['output']!r}"
        return version, None


def stale(answers: Sequence[Answered], moves: Sequence[tuple[float, str]]) -> int:
    """How many requests were answered by the version before, although sent when the new one had answered already."""
    count = 0
    for number, (moved, version) in enumerate(moves):
        until = moves[number + 1][0] if number + 1 < len(moves) else float("inf")
        # one sent before may be an answer that the version gave when it served the last time, noted late
        first = min(each.answered for each in answers if each.version == version and each.sent > moved)
        count += sum(first < each.sent and each.answered < until and each.version != version for each in answers)
    return count


def learn_versions(base: str, **train: Any) -> None:
    """Two versions of the lineage, one task each, in the home of the environment; `train` changes the settings."""
    from flows.adapt import adapt
    from tasks.spec import AdaptSpec, parse

    train = {"max_prompt_tokens": 192, "checkpoint_steps": 0, **train}
    for task in TASKS:
        values = {"lineage": LINEAGE, "base_model": base, "task": task, "train": train,
                  "gate": NO_LIMITS}  # fmt: skip
        asyncio.run(adapt(parse(AdaptSpec, values, "benchmark")))


def texts_to_ask() -> list[str]:
    """The test rows of the first task, which both versions know."""
    lines = (EXAMPLES / "bank" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def answers_of(versions: Sequence[str], texts: Sequence[str], task: str, lineage: str = LINEAGE) -> Expected:
    """What each version answers to each text, asked alone and without a server."""
    from deal_core.evaluation.answerer import load_answerer
    from deal_core.evaluation.answering import InputRow
    from infra.settings import HomeSettings, ServingSettings

    found, precision = {}, ServingSettings().serving_precision
    for version in versions:
        with tempfile.TemporaryDirectory() as folder:
            open_registry().download(lineage, version, Path(folder) / "version")
            answerer = load_answerer(Path(folder) / "version", HomeSettings().cache_dir, precision=precision)
            found[version] = [answerer.answer([InputRow(text, task)])[0] for text in texts]
    return found


@contextmanager
def served(
    lineage: str = LINEAGE, environment: Mapping[str, str] | None = None
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`deal serve` of a lineage: its address and process; ended afterwards. Environment None: that of this process."""
    process = subprocess.Popen(
        [*DEAL, "serve", "--lineage", lineage, "--port", "0", "--json"], stdout=subprocess.PIPE, text=True,
        env=environment,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if "url" in (event := json.loads(line)):
                threading.Thread(target=process.stdout.read, daemon=True).start()
                yield event["url"], process
                return
        raise RuntimeError(f"deal serve ended with exit code {process.wait()}")
    finally:
        process.terminate()
        process.wait(60)


@dataclass
class Memory:
    """The memory of a process and its children, looked at again and again in a thread."""

    process: psutil.Process
    bytes_seen: list[int] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Look while the block runs."""
        thread = threading.Thread(target=self._look)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()

    def _look(self) -> None:
        while not self._stop.wait(MEMORY_SECONDS):
            total = 0
            for each in (self.process, *self.process.children(recursive=True)):
                with suppress(psutil.Error):
                    total += each.memory_full_info().pss  # shared pages are shared out
            self.bytes_seen.append(total)


def measure(num_clients: int, seconds: float, num_moves: int) -> dict[str, Any]:
    """Serve, ask and move; the figures."""
    registry, texts = open_registry(), texts_to_ask()
    versions = [info.version for info in registry.versions(LINEAGE)][:2]
    expected = answers_of(versions, texts, "bank")
    registry.set_alias(LINEAGE, "champion", versions[-1])
    moves, took = [], []
    with served() as (url, process):
        clients, memory = Clients(url, texts, "bank", expected), Memory(psutil.Process(process.pid))
        started = time.monotonic()
        with memory.watched(), clients.asking(num_clients):
            for number in range(num_moves):
                time.sleep(max(0.0, started + seconds * (number + 1) / (num_moves + 1) - time.monotonic()))
                version = versions[number % 2]
                moves.append((time.monotonic(), version))
                registry.set_alias(LINEAGE, "champion", version)
                took.append(clients.first_of(version, moves[-1][0]))
                print(f"version {version} answers {took[-1]:.1f} s after the alias moved", flush=True)
            time.sleep(max(0.0, started + seconds - time.monotonic()))
    answers = clients.answers
    problems = [each.problem for each in answers if each.problem]
    latencies = sorted(each.answered - each.sent for each in answers)
    return {
        "num_clients": num_clients, "seconds": round(time.monotonic() - started, 1), "num_requests": len(answers),
        "num_failed": len(problems), "problems": sorted(set(problems))[:5],
        "num_stale": stale(answers, moves), "num_texts_that_tell_the_versions_apart": sum(
            first != second for first, second in zip(*expected.values(), strict=True)
        ),
        "answered_by": {version: sum(each.version == version for each in answers) for version in versions},
        "seconds_from_alias_to_first_answer": [round(value, 1) for value in took],
        "memory_gb": {"median": round(statistics.median(memory.bytes_seen) / 1e9, 2),
                      "max": round(max(memory.bytes_seen) / 1e9, 2)},
        "requests_per_second": round(len(answers) / (answers[-1].answered - started), 1),
        "latency_seconds": {"median": round(statistics.median(latencies), 3),
                            "p99": round(latencies[int(0.99 * len(latencies))], 3), "max": round(latencies[-1], 3)},
    }  # fmt: skip


@contextmanager
def learned_home(base: str, precision: str, **train: Any) -> Iterator[None]:
    """A new home with two versions of LINEAGE, which this process and its children use. `base` may be tiny."""
    with tempfile.TemporaryDirectory(prefix="deal-serving-") as folder:
        for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "DEAL_STORE_URI"):
            os.environ.pop(name, None)
        from flows.server.embedded import calm_libraries, enter_home

        enter_home(Path(folder) / "home")
        os.environ["DEAL_SERVING_PRECISION"] = precision
        if base == "tiny":
            base = str(Path(folder) / "tiny")
            build_tiny_base(Path(base))
        learn_versions(base, **train)
        calm_libraries()
        yield


def main() -> None:
    """Learn, serve, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2-135m-instruct", help="base model, or tiny")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--moves", type=int, default=4, help="of the alias; every other one is a rollback")
    parser.add_argument("--precision", default="fp32", help="of the base model when it serves: fp32, bf16 or auto")
    parser.add_argument("--steps", type=int, default=None, help="training steps of each version [one epoch]")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/serving.json"))
    given = parser.parse_args()
    with learned_home(given.base, given.precision, **({"max_steps": given.steps} if given.steps else {})):
        figures = measure(given.clients, given.seconds, given.moves)
    found = {"base": given.base, "precision": given.precision, **figures}
    write_result(given.out, found)
    sys.exit(found["num_failed"] > 0 or found["num_stale"] > 0)


if __name__ == "__main__":
    main()
