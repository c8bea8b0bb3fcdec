"""The memory model of `deal check --plan` against real runs: peak resident memory of three steps, and the prediction.

    OMP_NUM_THREADS=1 python -m benchmarks.speed.plan_memory

Each case runs in a process of its own. Its peak counts from just before the base model is loaded, with the libraries
imported, by the kernel's own mark (VmHWM): it holds weights, adapter, optimiser, activations, and whatever the
allocator and the loading took beside them.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import typer
from datasets import Dataset, disable_progress_bars
from transformers import AutoTokenizer

from benchmarks.method.versions import train_into
from benchmarks.output import RESULTS, Out, alone, write_result
from benchmarks.tiny_base import build_tiny_base
from deal_core.base_model.load import find_config, load_base
from deal_core.base_model.sources import DEFAULT_BASE
from deal_core.config import AdapterConfig, TrainConfig
from deal_core.data.schema import TaskSchema
from deal_core.method_config import MethodConfig
from deal_core.planning.memory import BatchShape, MemoryPlan, MethodShape, largest_batch, longest_of, plan_memory
from deal_core.planning.meta_model import measure_model
from deal_core.strategies.deal import Deal
from deal_core.strategies.strategy import PlannedArrival
from deal_core.training.train import TrainingSetup
from infra.settings import HomeSettings

TASK = TaskSchema(name="new", labels=("first", "second"), instruction="Which of the two is it?")
OLD_TASK = TaskSchema(name="old", labels=("even", "odd"), instruction="Even or odd?")
ADAPTER = AdapterConfig(rank=16)


@dataclass(frozen=True)
class Case:
    """One run: a base model ("tiny" is made on the spot), its precision, and the settings that matter."""

    base: str
    precision: Any
    is_first_task: bool
    batch_size: int
    words: int
    checkpointing: bool = False

    def train(self) -> TrainConfig:
        """Three steps."""
        return TrainConfig(
            max_steps=3, batch_size=self.batch_size, checkpoint_steps=0, gradient_checkpointing=self.checkpointing
        )

    def rows(self) -> Dataset:
        """Rows of numbers, all about equally long."""
        texts = [" ".join(str((7 * i + 13 * j) % 97) for j in range(self.words)) for i in range(4 * self.batch_size)]
        return Dataset.from_list([{"input": t, "output": TASK.labels[i % 2]} for i, t in enumerate(texts)])


CASES = (
    Case("tiny", "fp32", True, 64, 60),
    Case("tiny", "fp32", False, 64, 60),
    Case(DEFAULT_BASE, "fp32", True, 8, 60),
    Case(DEFAULT_BASE, "fp32", False, 8, 60),
    Case(DEFAULT_BASE, "fp32", False, 8, 60, checkpointing=True),
    Case(DEFAULT_BASE, "bf16", False, 8, 60),
)


def resident(mark: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    line = re.search(rf"{mark}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert line is not None
    return int(line[1]) * 1024


def predict(case: Case, source: str, num_old_tasks: int) -> tuple[MemoryPlan, BatchShape]:
    """What `deal check --plan` says of a case, and the largest batch."""
    found, train = find_config(source, HomeSettings().cache_dir), case.train()
    tokenizer = AutoTokenizer.from_pretrained(found.folder)
    olds = [OLD_TASK] * num_old_tasks
    arrival = PlannedArrival(task=TASK, old_tasks=tuple(olds), num_rows=0, num_steps=0)
    num_rows = largest_batch(train, rehearsed_per_step=Deal.rehearsed_per_step(MethodConfig(), arrival), on_cpu=True)
    batch = longest_of(case.rows(), tokenizer, TASK, olds, train, num_rows, {})
    shape = MethodShape(rank=ADAPTER.rank, strategy="deal", method=MethodConfig(), is_first_task=num_old_tasks == 0)
    plan = plan_memory(
        measure_model(found.config, ADAPTER),
        batch,
        shape,
        train=train,
        precision=case.precision,
        on_cpu=True,
    )
    return plan, batch


def learn(case: Case, source: str, parent: Path | None, out: Path) -> None:
    """Take three steps, and keep the adapter in `out`."""
    disable_progress_bars()
    setup = TrainingSetup(
        task=TASK,
        strategy="deal",
        adapter=ADAPTER,
        method=MethodConfig(),
        train=case.train(),
        old_tasks=() if parent is None else (OLD_TASK,),
    )
    base = load_base(source, HomeSettings().cache_dir, precision=case.precision)
    train_into(out, base, case.rows(), setup, parent)


def run_case(case: Case, source: str, parent: Path | None) -> dict[str, Any]:
    """Predict, run, and return both."""
    predicted, batch = predict(case, source, num_old_tasks=0 if parent is None else 1)
    Path("/proc/self/clear_refs").write_text("5")  # the mark begins anew here
    before = resident("VmRSS")
    with tempfile.TemporaryDirectory() as work:
        learn(case, source, parent, Path(work))
    return {
        "predicted": {**vars(predicted), "total": predicted.total},
        "num_tokens": batch.num_tokens,
        "measured_peak": resident("VmHWM") - before,
        "before": before,
    }


def main(
    out: Out = RESULTS / "plan_memory.json",
) -> None:
    """Run every case and write predicted and measured bytes, and their ratio."""
    results = []
    with tempfile.TemporaryDirectory() as work:
        tiny = Path(work) / "tiny"
        build_tiny_base(tiny)
        for case in CASES:
            source = str(tiny) if case.base == "tiny" else case.base
            parent = None if case.is_first_task else Path(work) / f"parent-{case.base}"
            if parent is not None and not parent.is_dir():
                alone(learn, replace(case, batch_size=2, words=10, checkpointing=False), source, None, parent)
            found = alone(run_case, case, source, parent)
            ratio = found["measured_peak"] / found["predicted"]["total"]
            results.append({**vars(case), **found, "measured_over_predicted": ratio})
            typer.echo(f"{case}: {ratio:.2f}")
    write_result(out, {"torch": torch.__version__, "cases": results})


if __name__ == "__main__":
    typer.run(main)
