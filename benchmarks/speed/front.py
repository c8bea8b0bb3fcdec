"""What `deal serve --engine` adds to a vLLM server, and what it does under load, on a real server of this machine.

    make engine
    python -m benchmarks.speed.front
    python -m benchmarks.speed.front --old TREE

Two versions of a tiny base model are learned, whose answers differ. One vLLM server and one front are started.

- cost: one client asks the front and then the engine itself, with as many tokens, again and again. The figures are the
  median and the 95th percentile of the neighbours' differences.
- load: 32 clients ask the front and the engine itself in turns. The processor time of a request is that of the front's
  process over the turn. With --old, the front of another checkout, of the commit that the figure is compared with,
  takes turns too.
- leaving: a client that asks for many answers goes away. The figure is the time for which the engine goes on with them,
  by its counter of tokens.
- moves: 32 clients ask while two versions are promoted, one is rolled back and one is tried as a canary. An answer is
  right if it is what the version that it names gives alone.
- streams: 1,000 streams are open at once. The figure is the memory of the front and its children, shared pages counted
  once.
- end: Ctrl-C while 32 clients ask. The figure is the time until the process ends.
"""

from __future__ import annotations

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
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import psutil
import typer

from benchmarks.output import RESULTS, Out, write_result
from benchmarks.speed.real_engine import running_engine
from benchmarks.speed.serving import (
    LINEAGE,
    Clients,
    Expected,
    Memory,
    answers_of,
    learned_home,
    make_champion,
    seconds_of_end,
    served,
    stale,
    texts_to_ask,
)
from benchmarks.tiny_base import build_tiny_base
from deal_core.judging_config import RolloutTerms
from infra.promotions import Change, PromotionLog
from infra.store.opening import open_store
from infra.versions import UNREGISTERED, Versions
from tasks.lineage.history import find_version

NUM_CLIENTS = 32
NUM_STREAMS = 1000
WAIT_SECONDS = 120.0
CHILD = """
import sys
try:
    from deal_pipeline.cli.app import main
except ImportError:  # an earlier release
    from flows.cli import main
main()
"""
app = typer.Typer(help=__doc__, rich_markup_mode=None)


@dataclass(frozen=True)
class Target:
    """Where clients send a request, its body for each text, and the process whose time is counted."""

    url: str
    bodies: Sequence[Mapping[str, Any]]
    process: psutil.Process | None = None

    def processor_seconds(self) -> float:
        """The processor time of the process and its children so far."""
        if self.process is None:
            return 0.0
        times = [each.cpu_times() for each in (self.process, *self.process.children(recursive=True))]
        return sum(own.user + own.system for own in times)


def bodies_for_engine(url: str, adapter: str, texts: Sequence[str]) -> list[dict[str, Any]]:
    """What the front sends for each text: as many tokens, with log-probabilities."""
    bodies = []
    for text in texts:
        asked = {"model": f"{LINEAGE}/bank", "prompt": text}
        answer = httpx.post(f"{url}/v1/completions", json=asked, timeout=WAIT_SECONDS).raise_for_status()
        tokens = answer.json()["usage"]
        bodies.append(
            {
                "model": adapter,
                "prompt": [[5] * tokens["prompt_tokens"]],
                "max_tokens": tokens["completion_tokens"],
                "temperature": 0,
                "ignore_eos": True,
                "logprobs": 20,
                "logprob_token_ids": list(range(6)),
            }
        )
    return bodies


def measure_cost(front: Target, engine: Target, num_pairs: int) -> dict[str, Any]:
    """Ask the front and then the engine itself with one text; milliseconds of the difference."""
    with httpx.Client(timeout=WAIT_SECONDS) as client:

        def seconds(target: Target) -> float:
            begun = time.perf_counter()
            client.post(f"{target.url}/v1/completions", json=target.bodies[0]).raise_for_status()
            return time.perf_counter() - begun

        pairs = [(seconds(front), seconds(engine)) for _ in range(num_pairs)]
    differences = [1e3 * (through - alone) for through, alone in pairs]
    return {
        "num_pairs": num_pairs,
        "front_ms": round(1e3 * statistics.median(through for through, _ in pairs), 2),
        "engine_ms": round(1e3 * statistics.median(alone for _, alone in pairs), 2),
        "difference_ms": round(statistics.median(differences), 2),
        "difference_p95_ms": round(statistics.quantiles(differences, n=20)[-1], 2),
    }


async def ask_for(target: Target, seconds: float) -> list[float]:
    """Let the clients ask for a while, each without a pause; the seconds of each request."""
    took: list[float] = []
    end = time.monotonic() + seconds

    async def ask(client: httpx.AsyncClient, number: int) -> None:
        while time.monotonic() < end:
            body, begun = target.bodies[number % len(target.bodies)], time.monotonic()
            (await client.post(f"{target.url}/v1/completions", json=body)).raise_for_status()
            took.append(time.monotonic() - begun)
            number += NUM_CLIENTS

    limits = httpx.Limits(max_connections=NUM_CLIENTS)
    async with httpx.AsyncClient(timeout=WAIT_SECONDS, limits=limits) as client, asyncio.TaskGroup() as group:
        for number in range(NUM_CLIENTS):
            group.create_task(ask(client, number))
    return took


def measure_load(targets: Mapping[str, Target], seconds: float, rounds: int) -> dict[str, Any]:
    """Ask each target in turns with 32 clients: latency, and processor time a request."""
    took: dict[str, list[float]] = {name: [] for name in targets}
    processor: dict[str, list[float]] = {name: [] for name in targets}
    for number in range(-1, rounds):  # the first round warms up
        for name in [*targets][:: 1 if number % 2 else -1]:
            before = targets[name].processor_seconds()
            answers = asyncio.run(ask_for(targets[name], seconds))
            if number >= 0:
                took[name] += answers
                processor[name].append(1e3 * (targets[name].processor_seconds() - before) / len(answers))
    return {
        name: {
            "num_requests": len(took[name]),
            "p50_ms": round(1e3 * statistics.median(took[name]), 1),
            "p95_ms": round(1e3 * statistics.quantiles(took[name], n=20)[-1], 1),
            "processor_ms": round(statistics.median(processor[name]), 2) if targets[name].process else None,
        }
        for name in targets
    }


def measure_moves(url: str, expected: Expected, seconds: float) -> dict[str, Any]:
    """Two promotions, a rollback and a canary while 32 clients ask."""
    moves = []
    clients = Clients(url, texts_to_ask(), "bank", expected)
    begun = time.monotonic()
    with clients.asking(NUM_CLIENTS):
        for number, version in enumerate(("1", "2", "1")):
            time.sleep(max(0.0, begun + seconds * (number + 1) / 5 - time.monotonic()))
            moves.append((time.monotonic(), version))
            make_champion(version)
            clients.first_of(version, moves[-1][0])
        store = open_store()
        parent = find_version(store, LINEAGE, "1")
        terms = RolloutTerms(kind="canary", share=0.5, num_rows=10**6, max_drop_points=100.0, confidence=0.95)
        tried = find_version(store, LINEAGE, "2").model_copy(
            update={"version": UNREGISTERED, "run_key": "canary", "parent_version": parent.version, "rollout": terms}
        )
        number_of_canary = Versions(store).register(tried).version
        log, roles = PromotionLog(store), {"who": "benchmark", "why": "a measurement", "before": "1", "champion": "1"}
        change = Change(action="rollout", lineage=LINEAGE, version=number_of_canary, rollout="canary", **roles)
        begun_canary = time.monotonic()
        assert log.add(log.last(LINEAGE), change) is not None
        clients.first_of(number_of_canary, begun_canary)
        time.sleep(max(0.0, begun + seconds - time.monotonic()))
    problems = [answer.problem for answer in clients.answers if answer.problem]
    assert log.add(log.last(LINEAGE), change.model_copy(update={"action": "rejected", "rollout": None})) is not None
    return {
        "seconds": round(time.monotonic() - begun, 1),
        "num_requests": len(clients.answers),
        "num_failed_or_wrong": len(problems),
        "problems": sorted(set(problems))[:5],
        # a canary answers beside the champion from then on
        "num_of_the_version_before": stale([each for each in clients.answers if each.sent < begun_canary], moves),
        "num_of_canary": sum(answer.version == number_of_canary for answer in clients.answers),
    }


def measure_streams(url: str, process: psutil.Process) -> dict[str, Any]:
    """Open 1,000 streams, and read them when all are open."""
    memory = Memory(process)
    before = sum(each.memory_full_info().pss for each in (process, *process.children(recursive=True)))
    opened, ended = 0, 0
    body = {"model": f"{LINEAGE}/bank", "prompt": "x", "max_tokens": 20, "temperature": 2.0, "stream": True}

    async def read(client: httpx.AsyncClient, all_open: asyncio.Event) -> None:
        nonlocal opened, ended
        async with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
            answer.raise_for_status()
            opened += 1
            if opened == NUM_STREAMS:
                all_open.set()
            await all_open.wait()
            async for line in answer.aiter_lines():
                ended += line == "data: [DONE]"

    async def read_all() -> None:
        all_open = asyncio.Event()
        limits = httpx.Limits(max_connections=NUM_STREAMS)
        async with httpx.AsyncClient(timeout=10 * WAIT_SECONDS, limits=limits) as client:
            await asyncio.gather(*[read(client, all_open) for _ in range(NUM_STREAMS)])

    begun = time.monotonic()
    with memory.watched():
        asyncio.run(read_all())
    return {
        "num_streams": NUM_STREAMS,
        "num_ended": ended,
        "seconds": round(time.monotonic() - begun, 1),
        "before_mb": round(before / 1e6),
        "most_mb": round(max(memory.bytes_seen) / 1e6),
    }


def measure_leaving(url: str, engine_url: str, times: int = 5) -> dict[str, Any]:
    """Go away while the engine answers; seconds until it makes no more tokens, and those of whole answers."""
    body = {"model": f"{LINEAGE}/bank", "prompt": (texts_to_ask() * 20)[:200], "max_tokens": 20, "temperature": 2.0}

    def num_tokens() -> float:
        lines = httpx.get(f"{engine_url}/metrics", timeout=WAIT_SECONDS).text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:generation_tokens_total"))

    begun = time.monotonic()
    httpx.post(f"{url}/v1/completions", json=body, timeout=WAIT_SECONDS).raise_for_status()
    whole = time.monotonic() - begun
    went_on, made = [], []
    for _ in range(times):
        before = num_tokens()
        with suppress(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/completions", json=body, timeout=whole / 4)
        left = last = time.monotonic()
        seen = num_tokens()
        while time.monotonic() < left + whole:
            if (now := num_tokens()) != seen:
                seen, last = now, time.monotonic()
        went_on.append(last - left)
        made.append(seen - before)
    return {
        "whole_seconds": round(whole, 2),
        "median_seconds": round(statistics.median(went_on), 3),
        "most_seconds": round(max(went_on), 3),
        "tokens_made": made,
    }


def measure_end(url: str, expected: Expected, process: subprocess.Popen[str]) -> float:
    """Seconds from Ctrl-C to the end of the process, while 32 clients ask."""
    with Clients(url, texts_to_ask(), "bank", expected).asking(NUM_CLIENTS):
        time.sleep(3.0)
        return seconds_of_end(process)


@contextmanager
def served_from(tree: Path, environment: Mapping[str, str]) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`deal serve` of another checkout."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, "serve", "--lineage", LINEAGE, "--port", "0", "--json"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tree,
        env={**environment, "PYTHONPATH": str(tree)},
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if "url" in (event := json.loads(line)):
                threading.Thread(target=process.stdout.read, daemon=True).start()
                yield event["url"], process
                return
        raise RuntimeError(f"deal serve of {tree} ended with exit code {process.wait()}")
    finally:
        process.terminate()
        process.wait(60)


@app.command()
def measure(
    seconds: Annotated[float, typer.Option(help="Of a turn of the clients.")] = 10.0,
    rounds: Annotated[int, typer.Option(help="Turns of each kind.")] = 5,
    pairs: Annotated[int, typer.Option(help="Pairs of requests for the front's own cost.")] = 100,
    moving: Annotated[float, typer.Option(help="Seconds of the moves.")] = 120.0,
    old: Annotated[Path | None, typer.Option(help="Checkout of the front to compare with.")] = None,
    out: Out = RESULTS / "front.json",
) -> None:
    """Measure, and write the figures."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        base = Path(folder) / "base"
        build_tiny_base(base, width=128)
        stack.enter_context(learned_home(str(base), "fp32", max_steps=20, learning_rate=0.003))
        texts = texts_to_ask()
        expected = dict(answers_of(["1", "2"], texts, "bank"))
        expected["3"] = expected["2"]  # the canary
        make_champion("2")
        (Path(folder) / "engine").mkdir()
        engine = stack.enter_context(running_engine(base, Path(folder) / "engine"))
        environment = {**os.environ, "DEAL_ENGINE_URL": engine.url, "DEAL_LOG_PREDICTIONS": "numbers"}
        url, process = stack.enter_context(served(environment=environment))
        asked = [{"model": f"{LINEAGE}/bank", "prompt": text} for text in texts]
        (adapter,) = engine.adapters()
        targets = {
            "front": Target(url, asked, psutil.Process(process.pid)),
            "engine": Target(engine.url, bodies_for_engine(url, adapter, texts)),
        }
        result: dict[str, Any] = {"seconds_per_turn": seconds, "num_rounds": rounds, "num_clients": NUM_CLIENTS}

        def note(name: str, figures: object) -> None:
            result[name] = figures
            print(name, json.dumps(figures), flush=True)

        note("cost", measure_cost(targets["front"], targets["engine"], pairs))
        with ExitStack() as other:
            if old is not None:
                old_url, old_process = other.enter_context(served_from(old.resolve(), environment))
                targets["old"] = Target(old_url, asked, psutil.Process(old_process.pid))
            note("load", measure_load(targets, seconds, rounds))
        note("streams", measure_streams(url, psutil.Process(process.pid)))
        note("leaving", measure_leaving(url, engine.url))
        note("moves", measure_moves(url, expected, moving))
        note("end_seconds", measure_end(url, expected, process))
    write_result(out, result)


if __name__ == "__main__":
    app()
