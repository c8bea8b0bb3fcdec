"""Is the fiftieth adaptation as cheap as the second? Training time, peak memory and adapter of both, interleaved.

    python -m benchmarks.number_of_tasks

Both learn the same rows, from the same parent adapter with something in every slot; one is told of a single old task,
the other of 49, each with an instruction and labels of its own, which `deal` rehearses. Each measurement is a process
of its own. Time is that of the whole training: reading the parent's factors, asking it about the old tasks, and the
steps.
"""

from __future__ import annotations

import json
import random
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from datasets import Dataset, disable_progress_bars

from benchmarks.output import alone, write_result
from benchmarks.step_cost import make_parent
from benchmarks.tiny_base import EXAMPLES
from deal_core.base_model.load import load_base
from deal_core.base_model.sources import DEFAULT_BASE
from deal_core.config import AdapterConfig, TrainConfig
from deal_core.data.schema import TaskSchema
from deal_core.evaluation.metrics import paired_interval
from deal_core.method_config import MethodConfig
from deal_core.training.train import TrainingSetup, train_adapter
from infra.settings import HomeSettings

SECOND, FIFTIETH = 1, 49
FIGURES = ("seconds", "peak_memory_mib", "adapter_bytes")


def old_task(number: int) -> TaskSchema:
    """A task that asks in its own words."""
    labels = tuple(f"{word} {number}" for word in ("refund", "delivery", "question", "complaint"))
    return TaskSchema(name=f"old-{number}", labels=labels, instruction=f"Sort the message as desk {number} would.")


def adapt(num_old: int, base: str, parent: Path, steps: int) -> dict[str, Any]:
    """The figures of one training."""
    disable_progress_bars()
    lines = (EXAMPLES / "bank" / "train.jsonl").read_text().splitlines()
    rows = Dataset.from_list([{"input": row["text"], "output": row["label"]} for row in map(json.loads, lines)])
    loaded = load_base(base, HomeSettings().cache_dir)
    with tempfile.TemporaryDirectory() as work:
        started = time.perf_counter()
        train_adapter(
            loaded, rows,
            TrainingSetup(
                strategy="deal",
                task=TaskSchema(
                    name="bank", labels=tuple(sorted(set(rows["output"]))), instruction="What is it about?"
                ),
                adapter=AdapterConfig(),
                method=MethodConfig(),
                train=TrainConfig(max_steps=steps, checkpoint_steps=0),
                old_tasks=tuple(old_task(number) for number in range(num_old)),
            ),
            parent_folder=parent,
            output_folder=Path(work),
            checkpoint_folder=Path(work) / "checkpoints",
        )
        seconds = time.perf_counter() - started
        size = sum(file.stat().st_size for file in Path(work).glob("*.safetensors"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": seconds, "peak_memory_mib": peak, "adapter_bytes": size}


def main(
    base: Annotated[str, typer.Option(help="Base model.")] = DEFAULT_BASE,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 40,
    measurements: Annotated[int, typer.Option(help="Trainings of each.")] = 5,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("benchmarks/results/number_of_tasks.json"),
) -> None:
    """Print and write the medians of both and their paired ratios."""
    runs: dict[int, list[dict[str, float]]] = {SECOND: [], FIFTIETH: []}
    order = random.Random(0)
    with tempfile.TemporaryDirectory() as parent:
        make_parent(base, AdapterConfig().rank, Path(parent))
        for _ in range(measurements):
            for num_old in order.sample(list(runs), len(runs)):
                runs[num_old].append(alone(adapt, num_old, base, Path(parent), steps))
    result: dict[str, Any] = {"base": base, "num_steps": steps, "num_measurements": measurements}
    for name in FIGURES:
        second, fiftieth = ([run[name] for run in runs[num_old]] for num_old in (SECOND, FIFTIETH))
        ratios = [late / early for late, early in zip(fiftieth, second, strict=True)]
        interval = paired_interval(ratios, [0.0] * len(ratios))
        result[name] = {
            "median_of_the_second": statistics.median(second),
            "median_of_the_fiftieth": statistics.median(fiftieth),
            "median_ratio": statistics.median(ratios),
            "mean_ratio_ci95": [interval.mean, interval.low, interval.high],
        }
    write_result(out, result)


if __name__ == "__main__":
    typer.run(main)
