"""The memory model of `deal plan` against real runs: peak resident memory of three steps beside what was predicted.

    OMP_NUM_THREADS=1 python -m benchmarks.plan_memory

Each case runs in a process of its own. Its peak counts from just before the base model is loaded, with the libraries
imported, by the kernel's own mark (VmHWM): it holds weights, adapter, optimiser, activations, and whatever the
allocator and the loading took beside them.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from datasets import Dataset, disable_progress_bars

from benchmarks.tiny_base import build_tiny_base
from deal_core.adapter.state import load_method_state
from deal_core.base_model.load import find_config, load_base
from deal_core.base_model.sources import DEFAULT_BASE
from deal_core.config import AdapterConfig, TrainConfig
from deal_core.data.schema import TaskSchema
from deal_core.method_config import MethodConfig
from deal_core.planning.memory import MethodShape, largest_batch, longest_of, plan_memory
from deal_core.planning.meta_model import measure_activations, measure_model
from deal_core.training.train import TrainingSetup, train_adapter
from infra.settings import HomeSettings

TASK = TaskSchema(name="new", labels=("first", "second"), instruction="Which of the two is it?")
OLD_TASK = TaskSchema(name="old", labels=("even", "odd"), instruction="Even or odd?")


@dataclass(frozen=True)
class Case:
    """One run: a base model ("tiny" is made on the spot), its precision, and the settings that matter."""

    base: str
    precision: Any
    is_first_task: bool
    batch_size: int
    words: int
    checkpointing: bool = False


CASES = (
    Case("tiny", "fp32", True, 64, 60),
    Case("tiny", "fp32", False, 64, 60),
    Case(DEFAULT_BASE, "fp32", True, 8, 60),
    Case(DEFAULT_BASE, "fp32", False, 8, 60),
    Case(DEFAULT_BASE, "fp32", False, 8, 60, checkpointing=True),
    Case(DEFAULT_BASE, "bf16", False, 8, 60),
)


def make_rows(num_rows: int, words: int) -> Dataset:
    """Rows of numbers, all about equally long."""
    texts = [" ".join(str((7 * i + 13 * j) % 97) for j in range(words)) for i in range(num_rows)]
    return Dataset.from_list([{"input": t, "output": TASK.labels[i % 2]} for i, t in enumerate(texts)])


def resident(mark: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    found = re.search(rf"{mark}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def run_case(case: Case, source: str, parent: Path | None, out: Path | None, queue: Any) -> None:
    """Predict, run three steps, and put both; with `out` the adapter is kept there."""
    disable_progress_bars()
    adapter, method = AdapterConfig(rank=16), MethodConfig()
    train = TrainConfig(max_steps=3, batch_size=case.batch_size, checkpoint_steps=0,
                        gradient_checkpointing=case.checkpointing)  # fmt: skip
    rows, olds = make_rows(4 * case.batch_size, case.words), [] if parent is None else [OLD_TASK]
    cache = HomeSettings().cache_dir
    found = find_config(source, cache)
    predicted = None
    if out is None:
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(found.folder)
        num_rows = largest_batch(train, method, num_old_tasks=len(olds), strategy="deal")
        batch = longest_of(rows, tokenizer, TASK, olds, train, num_rows)
        activations = measure_activations(found.config, adapter, batch, case.precision, on_cpu=True)
        predicted = plan_memory(
            measure_model(found.config, adapter), activations, batch,
            MethodShape(rank=16, strategy="deal", method=method, is_first_task=parent is None),
            train=train,
            precision=case.precision,
            on_cpu=True,
        )
    Path("/proc/self/clear_refs").write_text("5")  # the mark begins anew here
    before = resident("VmRSS")
    with tempfile.TemporaryDirectory() as work:
        train_adapter(
            load_base(source, cache, precision=case.precision), rows,
            TrainingSetup(
                task=TASK,
                strategy="deal",
                adapter=adapter,
                method=method,
                train=train,
                old_tasks=tuple(olds),
            ),
            parent_folder=parent,
            output_folder=out or Path(work) / "adapter",
            checkpoint_folder=Path(work) / "checkpoints",
        )
    if predicted is not None:
        queue.put({"predicted": {**vars(predicted), "total": predicted.total}, "num_tokens": batch.num_tokens,
                   "measured_peak": resident("VmHWM") - before, "before": before})  # fmt: skip


def in_process(*args: Any) -> Any:
    """Run a case in a process of its own, and return what it put; None where it put nothing."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=run_case, args=(*args, queue))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise typer.Exit(1)
    return None if queue.empty() else queue.get()


def main(
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("benchmarks/results/plan_memory.json"),
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
                in_process(replace(case, batch_size=2, words=10, checkpointing=False), source, None, parent)
                assert load_method_state(parent).strategy == "deal"
            found = in_process(case, source, parent, None)
            ratio = found["measured_peak"] / found["predicted"]["total"]
            results.append({**vars(case), **found, "measured_over_predicted": ratio})
            typer.echo(f"{case}: {ratio:.2f}")
            out.write_text(json.dumps({"torch": torch.__version__, "cases": results}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
