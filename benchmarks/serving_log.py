"""What the prediction log costs: requests per second of `deal serve` with the log on, against the log off.

    python -m benchmarks.serving_log --out benchmarks/results/serving_log.json

Two servers of one version run side by side, one without a log and one that keeps texts. The clients ask one of them at
a time, in turns of a few seconds, so that both meet the same machine. The figure is the median of the ratios of
neighbouring turns. With the tiny base, an answer costs next to nothing, so the ratio is a lower bound.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.output import write_result
from benchmarks.serving import LINEAGE, Clients, Expected, answers_of, learned_home, served, texts_to_ask
from infra.predictions import read_predictions
from infra.settings import HomeSettings
from infra.tracking.registry import open_registry
from tasks.context import current_store

KEPT = ("off", "texts")


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


def measure(num_clients: int, seconds: float, rounds: int) -> dict[str, Any]:
    """Serve twice, ask in turns; the figures."""
    texts, version = texts_to_ask(), open_registry().versions(LINEAGE)[-1].version
    expected = answers_of([version], texts, "bank")
    rates: dict[str, list[float]] = {kept: [] for kept in KEPT}
    with ExitStack() as servers:
        urls = {
            kept: servers.enter_context(served(environment={**os.environ, "DEAL_LOG_PREDICTIONS": kept}))[0]
            for kept in KEPT
        }
        for kept in KEPT:
            turn(urls[kept], texts, expected, num_clients, 2.0)
        for number in range(rounds):
            for kept in KEPT if number % 2 else KEPT[::-1]:
                rates[kept].append(turn(urls[kept], texts, expected, num_clients, seconds))
            print(f"round {number + 1}: " + ", ".join(f"{kept} {rates[kept][-1]:.1f}/s" for kept in KEPT), flush=True)
    logged = len(read_predictions(current_store(), HomeSettings().home, LINEAGE))
    ratios = sorted(on / off for off, on in zip(*rates.values(), strict=True))
    return {
        "num_clients": num_clients, "seconds_per_turn": seconds, "num_rounds": rounds, "num_logged": logged,
        "requests_per_second": {kept: round(statistics.median(values), 2) for kept, values in rates.items()},
        "ratio": {"median": round(statistics.median(ratios), 3), "min": round(ratios[0], 3),
                  "max": round(ratios[-1], 3)},
    }  # fmt: skip


def main() -> None:
    """Learn, serve, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2-135m-instruct", help="base model, or tiny")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=8.0, help="of a turn")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/serving_log.json"))
    given = parser.parse_args()
    with learned_home(given.base, "fp32", max_steps=3):
        figures = measure(given.clients, given.seconds, given.rounds)
    write_result(given.out, {"base": given.base, **figures})


if __name__ == "__main__":
    main()
