"""`deal serve` under clients that never stop asking: while the champion moves, and with a prediction log.

    python -m benchmarks.speed.serving moves
    python -m benchmarks.speed.serving log
    python -m benchmarks.speed.serving chats

Two versions are learned from tests/data/examples, `deal serve` is started, and clients ask it without a pause.

moves: does a request fail, and is every answer its version's? The clients ask for two minutes while the champion moves
back (a rollback) and forth. An answer is right if it is what the version that it names gives when it is asked alone,
and if no request that was sent after a version took over is answered by the one before. A move takes the time from its
entry in the promotion log to the first answer of the new version. Memory is that of the server and its children, with
shared pages counted once. The base model is in fp32: in bf16 the rounding of a batch tips answers that hang in the
balance, so that "what it gives alone" is no exact measure.

log: requests per second with the prediction log against without it. Two servers of one version run side by side, one
without a log and one that keeps texts. The clients ask one of them at a time, in turns of a few seconds, so that both
meet the same machine. The figure is the median of the ratios of neighbouring turns. With the tiny base, an answer costs
next to nothing, so the ratio is a lower bound.

chats: how much longer do answers take while one more client sends chats of 10,000 messages without a pause? The turns
are as those of log, with that client and without it. The figure is the median of the ratios of neighbouring turns'
median latencies; to seconds of an answer that costs next to nothing, with the tiny base, the ratio is an upper bound.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import httpx
import psutil
import typer

from benchmarks.output import DEAL, RESULTS, Out, write_result
from benchmarks.tiny_base import EXAMPLES, NO_LIMITS, build_tiny_base
from deal_core.base_model.sources import DEFAULT_BASE
from deal_core.evaluation.answering import MAX_INPUT_MESSAGES
from infra.predictions import read_predictions
from infra.promotions import Change, PromotionLog
from infra.serving.version_files import fetch_version
from infra.settings import HomeSettings, ServingSettings
from infra.versions import Versions
from tasks.context import current_store
from tasks.lineage.history import find_version

LINEAGE = "served"
TASKS: tuple[Mapping[str, Any], ...] = (
    {"name": "bank", "data": str(EXAMPLES / "bank/train.jsonl"), "test_data": str(EXAMPLES / "bank/test.jsonl")},
    {
        "name": "clinic",
        "data": str(EXAMPLES / "clinic/train.csv"),
        "test_data": str(EXAMPLES / "clinic/test.csv"),
        "columns": {"text": "note", "label": "finding"},
    },
)
MOVE_SECONDS = 300.0
"""A move that takes longer is given up."""
MEMORY_SECONDS = 0.25
"""Between two looks at the memory."""
LOGS = ("off", "texts")
"""What the prediction logs of the two servers keep."""

Expected = Mapping[str, Sequence[str]]
"""What each version answers to each of the texts."""

app = typer.Typer(help=__doc__, rich_markup_mode=None)
Base = Annotated[str, typer.Option(help="Base model, or tiny.")]


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
            times = [
                each.answered
                for each in list(self.answers)
                if each.version == version and each.answered > since and each.sent > sent_since
            ]
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
        values = {"lineage": LINEAGE, "base_model": base, "task": task, "train": train, "gate": NO_LIMITS}
        asyncio.run(adapt(parse(AdaptSpec, values, "benchmark")))


def make_champion(version: str, lineage: str = LINEAGE) -> None:
    """Write a move of the champion to the promotion log, as a rollback does. Nothing is written if it is champion."""
    log = PromotionLog(current_store())
    last = log.last(lineage)
    before = last.champion if last else None
    if before != version:
        change = Change(
            action="rolled back",
            lineage=lineage,
            version=version,
            before=before,
            champion=version,
            who="benchmark",
            why="a measurement",
        )
        assert log.add(last, change) is not None, "nobody else moves it"


def texts_to_ask() -> list[str]:
    """The test rows of the first task, which both versions know."""
    lines = (EXAMPLES / "bank" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def answers_of(versions: Sequence[str], texts: Sequence[str], task: str, lineage: str = LINEAGE) -> Expected:
    """What each version answers to each text, asked alone and without a server."""
    from deal_core.evaluation.answerer import load_answerer
    from deal_core.evaluation.answering import InputRow

    found, precision, store = {}, ServingSettings().serving_precision, current_store()
    for version in versions:
        with tempfile.TemporaryDirectory() as folder:
            fetch_version(store, find_version(store, lineage, version), Path(folder) / "version")
            answerer = load_answerer(Path(folder) / "version", HomeSettings().cache_dir, precision=precision)
            found[version] = [answerer.answer([InputRow(text, task)])[0] for text in texts]
    return found


@contextmanager
def served(
    lineage: str = LINEAGE, environment: Mapping[str, str] | None = None
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`deal serve` of a lineage: its address and process; ended afterwards. Environment None: that of this process."""
    process = subprocess.Popen(
        [*DEAL, "serve", "--lineage", lineage, "--port", "0", "--json"],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
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


def measure_moves(num_clients: int, seconds: float, num_moves: int) -> dict[str, Any]:
    """Serve, ask and move; the figures."""
    texts = texts_to_ask()
    versions = [info.version for info in Versions(current_store()).all(LINEAGE)][:2]
    expected = answers_of(versions, texts, "bank")
    make_champion(versions[-1])
    moves, took = [], []
    with served() as (url, process):
        clients, memory = Clients(url, texts, "bank", expected), Memory(psutil.Process(process.pid))
        started = time.monotonic()
        with memory.watched(), clients.asking(num_clients):
            for number in range(num_moves):
                time.sleep(max(0.0, started + seconds * (number + 1) / (num_moves + 1) - time.monotonic()))
                version = versions[number % 2]
                moves.append((time.monotonic(), version))
                make_champion(version)
                took.append(clients.first_of(version, moves[-1][0]))
                print(f"version {version} answers {took[-1]:.1f} s after the move", flush=True)
            time.sleep(max(0.0, started + seconds - time.monotonic()))
    answers = clients.answers
    problems = [each.problem for each in answers if each.problem]
    latencies = sorted(each.answered - each.sent for each in answers)
    return {
        "num_clients": num_clients,
        "seconds": round(time.monotonic() - started, 1),
        "num_requests": len(answers),
        "num_failed": len(problems),
        "problems": sorted(set(problems))[:5],
        "num_stale": stale(answers, moves),
        "num_texts_that_tell_the_versions_apart": sum(
            first != second for first, second in zip(*expected.values(), strict=True)
        ),
        "answered_by": {version: sum(each.version == version for each in answers) for version in versions},
        "seconds_from_alias_to_first_answer": [round(value, 1) for value in took],
        "memory_gb": {
            "median": round(statistics.median(memory.bytes_seen) / 1e9, 2),
            "max": round(max(memory.bytes_seen) / 1e9, 2),
        },
        "requests_per_second": round(len(answers) / (answers[-1].answered - started), 1),
        "latency_seconds": {
            "median": round(statistics.median(latencies), 3),
            "p99": round(latencies[int(0.99 * len(latencies))], 3),
            "max": round(latencies[-1], 3),
        },
    }


@contextmanager
def learned_home(base: str, precision: str, **train: Any) -> Iterator[str]:
    """A new home with two versions of LINEAGE, which this process and its children use: their base model's source.

    `base` may be tiny.
    """
    with tempfile.TemporaryDirectory(prefix="deal-serving-") as folder:
        for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "DEAL_STORE_URI"):
            os.environ.pop(name, None)
        from deal_pipeline.server.embedded import calm_libraries, enter_home

        enter_home(Path(folder) / "home")
        os.environ["DEAL_SERVING_PRECISION"] = precision
        if base == "tiny":
            base = str(Path(folder) / "tiny")
            build_tiny_base(Path(base))
        learn_versions(base, **train)
        calm_libraries()
        yield base


def turn(url: str, texts: Sequence[str], expected: Expected, num_clients: int, seconds: float) -> float:
    """Ask one server for a while.

    Returns:
        Right answers per second.

    Raises:
        RuntimeError: A request failed, or an answer was wrong.
    """
    clients = Clients(url, texts, "bank", expected)
    started = time.monotonic()
    with clients.asking(num_clients):
        time.sleep(seconds)
    took = time.monotonic() - started
    if problems := {each.problem for each in clients.answers if each.problem}:
        raise RuntimeError(f"A request failed: {sorted(problems)[0]}")
    return len(clients.answers) / took


def measure_log(num_clients: int, seconds: float, rounds: int) -> dict[str, Any]:
    """Serve twice, ask in turns; the figures."""
    texts, version = texts_to_ask(), Versions(current_store()).all(LINEAGE)[-1].version
    expected = answers_of([version], texts, "bank")
    rates: dict[str, list[float]] = {kept: [] for kept in LOGS}
    with ExitStack() as servers:
        urls = {
            kept: servers.enter_context(served(environment={**os.environ, "DEAL_LOG_PREDICTIONS": kept}))[0]
            for kept in LOGS
        }
        for kept in LOGS:
            turn(urls[kept], texts, expected, num_clients, 2.0)
        for number in range(rounds):
            for kept in LOGS if number % 2 else LOGS[::-1]:
                rates[kept].append(turn(urls[kept], texts, expected, num_clients, seconds))
            print(f"round {number + 1}: " + ", ".join(f"{kept} {rates[kept][-1]:.1f}/s" for kept in LOGS), flush=True)
    logged = len(read_predictions(current_store(), LINEAGE))
    ratios = sorted(on / off for off, on in zip(*rates.values(), strict=True))
    return {
        "num_clients": num_clients,
        "seconds_per_turn": seconds,
        "num_rounds": rounds,
        "num_logged": logged,
        "requests_per_second": {kept: round(statistics.median(values), 2) for kept, values in rates.items()},
        "ratio": {
            "median": round(statistics.median(ratios), 3),
            "min": round(ratios[0], 3),
            "max": round(ratios[-1], 3),
        },
    }


def learn_chats(base: str) -> None:
    """One more version of the lineage, which has learned a task of chats too."""
    from flows.adapt import adapt
    from tasks.spec import AdaptSpec, parse

    turns = [
        [{"role": "user", "content": f"Which number is {n}?"}, {"role": "assistant", "content": f"It is {n}."}]
        for n in range(60)
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "talk.jsonl"
        path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns), encoding="utf-8")
        task, train = {"name": "talk", "data": str(path)}, {"max_prompt_tokens": 192, "max_steps": 3}
        values = {"lineage": LINEAGE, "base_model": base, "task": task, "train": train, "gate": NO_LIMITS}
        asyncio.run(adapt(parse(AdaptSpec, values, "benchmark")))


@contextmanager
def long_chats(url: str) -> Iterator[list[float]]:
    """Send chats of 10,000 messages while the block runs, until one is not answered: the seconds of each."""
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": f"message {n}"} for n in range(MAX_INPUT_MESSAGES - 1)]
    body = json.dumps({"model": f"{LINEAGE}/talk", "messages": messages})
    stop, took = threading.Event(), list[float]()

    def send() -> None:
        with httpx.Client(timeout=300, headers={"Content-Type": "application/json"}) as client:
            while not stop.is_set():
                begun = time.monotonic()
                try:
                    client.post(f"{url}/v1/chat/completions", content=body).raise_for_status()
                except httpx.HTTPError:
                    return
                took.append(time.monotonic() - begun)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield took
    finally:
        stop.set()
        thread.join()


def seconds_of_end(process: subprocess.Popen[str]) -> float:
    """Seconds from Ctrl-C to the end of the process."""
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.wait(60)
    return round(time.monotonic() - begun, 1)


def measure_chats(num_clients: int, seconds: float, rounds: int) -> dict[str, Any]:
    """Serve, and ask in turns with and without a client of long chats; then end the server while it prepares one."""
    texts, version = texts_to_ask(), Versions(current_store()).all(LINEAGE)[-1].version
    make_champion(version)
    expected = answers_of([version], texts, "bank")
    medians: dict[bool, list[float]] = {False: [], True: []}
    chats: list[float] = []
    with served() as (url, process):
        turn(url, texts, expected, num_clients, 2.0)
        for number in range(rounds):
            for is_long in (False, True) if number % 2 else (True, False):
                clients = Clients(url, texts, "bank", expected)
                with long_chats(url) if is_long else nullcontext([]) as took, clients.asking(num_clients):
                    time.sleep(seconds)
                chats += took
                if is_long and not took:
                    raise RuntimeError("No long chat was answered")
                if problems := {answer.problem for answer in clients.answers if answer.problem}:
                    raise RuntimeError(f"A request failed: {sorted(problems)[0]}")
                medians[is_long].append(statistics.median(each.answered - each.sent for each in clients.answers))
            print(f"round {number + 1}: " + ", ".join(f"{values[-1]:.3f} s" for values in medians.values()), flush=True)
        with long_chats(url) as took:  # the last one finds no server, or is given up
            while not took:
                time.sleep(0.01)
            seconds_to_end = {"with": seconds_of_end(process)}
    with served() as (_, process):
        seconds_to_end["without"] = seconds_of_end(process)
    ratios = sorted(with_them / without for without, with_them in zip(*medians.values(), strict=True))
    return {
        "num_clients": num_clients,
        "num_messages": MAX_INPUT_MESSAGES - 1,
        "seconds_per_turn": seconds,
        "num_rounds": rounds,
        "num_chats": len(chats),
        "chat_seconds": round(statistics.median(chats), 3),
        "latency_seconds": {
            "without": round(statistics.median(medians[False]), 3),
            "with": round(statistics.median(medians[True]), 3),
        },
        "ratio": {
            "median": round(statistics.median(ratios), 2),
            "min": round(ratios[0], 2),
            "max": round(ratios[-1], 2),
        },
        "seconds_to_end": seconds_to_end,
    }


@app.command()
def moves(
    base: Base = DEFAULT_BASE,
    clients: Annotated[int, typer.Option(help="Clients at once.")] = 16,
    seconds: Annotated[float, typer.Option(help="How long they ask.")] = 120.0,
    num_moves: Annotated[int, typer.Option("--moves", help="Of the alias; every other one is a rollback.")] = 4,
    precision: Annotated[str, typer.Option(help="Of the base model when it serves: fp32, bf16 or auto.")] = "fp32",
    steps: Annotated[
        int | None, typer.Option(help="Training steps of each version.", show_default="the default training")
    ] = None,
    out: Out = RESULTS / "serving.json",
) -> None:
    """Requests that failed or were answered by the wrong version, the time of a move, memory and latencies."""
    with learned_home(base, precision, **({"max_steps": steps} if steps else {})):
        figures = measure_moves(clients, seconds, num_moves)
    write_result(out, {"base": base, "precision": precision, **figures})
    if figures["num_failed"] or figures["num_stale"]:
        raise typer.Exit(1)


@app.command()
def log(
    base: Base = DEFAULT_BASE,
    clients: Annotated[int, typer.Option(help="Clients at once.")] = 32,
    seconds: Annotated[float, typer.Option(help="Of a turn.")] = 8.0,
    rounds: Annotated[int, typer.Option(help="Turns of each server.")] = 8,
    out: Annotated[
        Path | None, typer.Option(help="Where the figures go.", show_default="serving_log.json, or _tiny")
    ] = None,
) -> None:
    """Requests per second with the log and without, and their ratio."""
    with learned_home(base, "fp32", max_steps=3):
        figures = measure_log(clients, seconds, rounds)
    write_result(out or RESULTS / f"serving_log{'_tiny' if base == 'tiny' else ''}.json", {"base": base, **figures})


@app.command()
def chats(
    base: Base = DEFAULT_BASE,
    clients: Annotated[int, typer.Option(help="Clients at once, besides the one with long chats.")] = 8,
    seconds: Annotated[float, typer.Option(help="Of a turn.")] = 8.0,
    rounds: Annotated[int, typer.Option(help="Turns with long chats, and as many without.")] = 8,
    out: Annotated[
        Path | None, typer.Option(help="Where the figures go.", show_default="serving_chats.json, or _tiny")
    ] = None,
) -> None:
    """Seconds of an answer while one more client sends very long chats, and without it, and their ratio."""
    with learned_home(base, "fp32", max_steps=3) as source:
        learn_chats(source)
        figures = measure_chats(clients, seconds, rounds)
    write_result(out or RESULTS / f"serving_chats{'_tiny' if base == 'tiny' else ''}.json", {"base": base, **figures})


if __name__ == "__main__":
    app()
