"""`deal serve` with a vLLM server behind it against the model in its own process, and an evaluation of either kind.

    make engine
    python -m benchmarks.speed.engine

Two versions are learned, and one vLLM server is started. Two `deal serve` answer the same rows in turns: one with the
model in its process, one with the engine. Clients ask without a pause. Every answer is compared with what the version
gives alone. The figures of a number of clients are medians over the turns.

The evaluation scores the same test rows with the same adapter in this process and over the engine, in turns.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.output import RESULTS, Out, write_result
from benchmarks.speed.real_engine import running_engine
from benchmarks.speed.serving import (
    LINEAGE,
    Clients,
    Expected,
    answers_of,
    learned_home,
    make_champion,
    served,
    texts_to_ask,
)
from benchmarks.tiny_base import build_tiny_base
from deal_core.base_model.load import load_base
from deal_core.base_model.sources import DEFAULT_BASE, resolve_base
from deal_core.evaluation.evaluate import evaluate_task
from infra.serving.evaluation import evaluation_engine
from infra.serving.version_files import fetch_version
from infra.settings import HomeSettings
from infra.store.opening import open_store
from infra.versions import Versions
from tasks.lineage.frozen_rows import load_test_set
from tasks.lineage.record import read_record

KINDS = ("process", "engine")
app = typer.Typer(help=__doc__, rich_markup_mode=None)


def ask_both(urls: dict[str, str], expected: Expected, num_clients: int, seconds: float, rounds: int) -> dict[str, Any]:
    """Ask both servers in turns: requests per second, and the 50th and 95th percentile of the seconds of a request."""
    texts = texts_to_ask()
    rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
    took: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(rounds):
        for kind in KINDS if number % 2 else KINDS[::-1]:
            clients, started = Clients(urls[kind], texts, "bank", expected), time.monotonic()
            with clients.asking(num_clients):
                time.sleep(seconds)
            if problems := {answer.problem for answer in clients.answers if answer.problem}:
                raise RuntimeError(f"A request failed: {sorted(problems)[0]}")
            rates[kind].append(len(clients.answers) / (time.monotonic() - started))
            took[kind] += [answer.answered - answer.sent for answer in clients.answers]
    return {
        kind: {
            "requests_per_second": round(statistics.median(rates[kind]), 2),
            "p50_ms": round(1e3 * statistics.median(took[kind]), 1),
            "p95_ms": round(1e3 * statistics.quantiles(took[kind], n=20)[-1], 1),
            "num_requests": len(took[kind]),
        }
        for kind in KINDS
    }


def evaluate_both(base_source: str, rounds: int) -> dict[str, Any]:
    """Score the newest version's test rows here and over the engine: the ratio of the seconds."""
    store = open_store()
    version = Versions(store).all(LINEAGE)[-1]
    sets = [load_test_set(store, task) for task in read_record(store, version).tasks]
    base = load_base(base_source, HomeSettings().cache_dir, precision="fp32")
    from deal_core.adapter.state import adapter_on

    engine = evaluation_engine(store, lambda: base)
    assert engine is not None, "the caller has set its address"
    took: dict[str, list[float]] = {kind: [] for kind in KINDS}
    answers: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        adapter = Path(folder) / "version"
        fetch_version(store, version, adapter)
        with adapter_on(base.model, adapter) as model, engine.answering(adapter) as over_engine:
            for number in range(rounds):
                for kind in KINDS if number % 2 else KINDS[::-1]:
                    begun = time.perf_counter()
                    answer = over_engine if kind == "engine" else None
                    found = [evaluate_task(model, base.tokenizer, rows, rows.rows, answer=answer) for rows in sets]
                    took[kind].append(time.perf_counter() - begun)
                    answers[kind] = [evaluation.answers for evaluation in found]
    ratios = [there / here for here, there in zip(took["process"], took["engine"], strict=True)]
    pairs = [(a, b) for here, there in zip(*answers.values(), strict=True) for a, b in zip(here, there, strict=True)]
    return {
        "num_rows": len(pairs),
        "num_equal_answers": sum(a == b for a, b in pairs),
        "num_rounds": rounds,
        "seconds": {kind: round(statistics.median(took[kind]), 2) for kind in KINDS},
        "ratio": round(statistics.median(ratios), 2),
    }


@app.command()
def measure(
    base: Annotated[str, typer.Option(help="Base model, or wide: a tiny one whose heads vLLM takes.")] = DEFAULT_BASE,
    clients: Annotated[list[int] | None, typer.Option(help="Numbers of clients.", show_default="1, 8, 32")] = None,
    seconds: Annotated[float, typer.Option(help="Of a turn.")] = 10.0,
    rounds: Annotated[int, typer.Option(help="Turns of each kind.")] = 3,
    out: Out = RESULTS / "engine.json",
) -> None:
    """Measure, and write the figures."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        source = base
        if base == "wide":
            source = str(Path(folder) / "base")
            build_tiny_base(Path(source), width=128)
        stack.enter_context(learned_home(source, "fp32", max_steps=20, learning_rate=0.003))
        versions = Versions(open_store()).all(LINEAGE)
        make_champion(versions[-1].version)
        expected = answers_of([versions[-1].version], texts_to_ask(), "bank")
        (Path(folder) / "engine").mkdir()
        model = resolve_base(source, HomeSettings().cache_dir)
        engine = stack.enter_context(running_engine(model, Path(folder) / "engine"))
        environment = {name: value for name, value in os.environ.items() if name != "DEAL_ENGINE_URL"}
        urls = {
            "process": stack.enter_context(served(environment=environment))[0],
            "engine": stack.enter_context(served(environment={**environment, "DEAL_ENGINE_URL": engine.url}))[0],
        }
        result: dict[str, Any] = {"base": base, "seconds_per_turn": seconds, "num_rounds": rounds}
        for num_clients in (1, *(clients or (1, 8, 32))):  # the first time warms up
            result[f"clients_{num_clients}"] = ask_both(urls, expected, num_clients, seconds, rounds)
            print(num_clients, result[f"clients_{num_clients}"], flush=True)
        os.environ["DEAL_EVALUATE_ENGINE"] = engine.url
        result["evaluation"] = evaluate_both(source, rounds)
    write_result(out, result)


if __name__ == "__main__":
    app()
