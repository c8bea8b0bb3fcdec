"""What DEAL's training costs beside plain LoRA's: a step, and an arrival after many tasks.

    python -m benchmarks.speed.steps cost
    python -m benchmarks.speed.steps number-of-tasks

cost: step time and peak memory of plain LoRA, of DEAL, and of DEAL's core without rehearsal. Plain LoRA is also run
with PyTorch's own backward pass of attention, which `base_model.cpu_attention` replaces on a CPU. Every variant has a
base model of its own. The variants take turns: one optimiser step each on the same batch, in random order, so that
other work of the machine falls on all. The questions of the rehearsal are as long as the rows of the batch. Peak
memory is measured in one process per variant.

number-of-tasks: is the fiftieth adaptation as cheap as the second? Both learn the same rows from the same parent, one
told of a single old task, the other of 49. Each old task has an instruction and labels of its own, which `deal`
rehearses. Each training has a process of its own. Its time includes asking the parent about the old tasks.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from datasets import Dataset, disable_progress_bars

from benchmarks.continual.paired import paired_interval
from benchmarks.method.versions import train_into
from benchmarks.output import RESULTS, Base, Out, alone, peak_bytes, write_result
from benchmarks.tiny_base import EXAMPLES
from deal_core.adapter.files import MethodState
from deal_core.adapter.state import attach_adapter, load_adapter, load_method_state, save_adapter
from deal_core.base_model.load import BaseModel, load_base
from deal_core.base_model.sources import DEFAULT_BASE
from deal_core.config import AdapterConfig, TrainConfig
from deal_core.data.collate import AnswerCollator, answer_logits
from deal_core.data.schema import TaskSchema
from deal_core.method_config import MethodConfig
from deal_core.strategies import make_strategy
from deal_core.strategies.strategy import TaskContext
from deal_core.training.train import TrainingSetup
from infra.settings import HomeSettings

PLAIN = "seq_lora"
FUSED = "seq_lora_fused_attention"
OLD_TASK = TaskSchema(name="old", labels=("first", "second"), instruction="Which of the two is it?")
VARIANTS: dict[str, tuple[str, tuple[TaskSchema, ...]]] = {
    PLAIN: ("seq_lora", (OLD_TASK,)),
    FUSED: ("seq_lora", (OLD_TASK,)),
    "deal_without_rehearsal": ("deal", ()),
    "deal": ("deal", (OLD_TASK,)),
}
"""Variant → its strategy, and the old tasks that it may rehearse."""
NUM_WARM_UP = 3
"""First steps, which warm allocators and kernels up and do not count."""
SECOND, FIFTIETH = 1, 49
"""Old tasks of the two arrivals that are compared."""

app = typer.Typer(help=__doc__, rich_markup_mode=None)
BatchSize = Annotated[int, typer.Option(help="Rows per step.")]
Tokens = Annotated[int, typer.Option(help="Tokens per row.")]


class Stepper:
    """One variant on a base model of its own, with the parent's adapter, taking optimiser steps on one batch."""

    def __init__(self, variant: str, source: str, parent: Path, num_rows: int, num_tokens: int) -> None:
        strategy, old_tasks = VARIANTS[variant]
        base = load_base(source, HomeSettings().cache_dir)
        if variant == FUSED:
            base.model.set_attn_implementation("sdpa")
        self._model = load_adapter(base.model, parent, is_trainable=True)
        self._batch = _make_batch(base, num_rows, num_tokens)
        self._strategy = make_strategy(strategy, MethodConfig(), 0)
        rows = Dataset.from_list([{"input": f"{i} is a number. " * num_tokens} for i in range(16)])
        context = TaskContext(
            base=base,
            task=TaskSchema(name="new"),
            rows=rows,
            encoded=rows,
            old_tasks=old_tasks,
            num_steps=6,
            adapter=AdapterConfig(),
            train=TrainConfig(max_prompt_tokens=num_tokens - 2),
        )
        self._strategy.prepare(self._model, load_method_state(parent), context)
        self._rehearsal = self._strategy.rehearsal()
        self._num_steps = 0
        self._optimizer = torch.optim.AdamW(list(self._strategy.parameters()), lr=5e-4, weight_decay=0.0)

    def step(self) -> float:
        """Forward, backward, the strategy's hooks, clip and AdamW; return the seconds it took."""
        started = time.perf_counter()
        logits = answer_logits(self._model, self._batch)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), self._batch["labels"].flatten()).backward()
        rehearsed = self._rehearsal and self._rehearsal.loss(self._model, self._num_steps)
        if rehearsed is not None:
            rehearsed.backward()
        self._num_steps += 1
        self._strategy.before_step()
        penalty = self._strategy.penalty()
        if penalty is not None:
            penalty.backward()
        torch.nn.utils.clip_grad_norm_(self._strategy.parameters(), 1.0)
        self._optimizer.step()
        self._strategy.after_step()
        self._model.zero_grad()
        self._optimizer.zero_grad()
        return time.perf_counter() - started


def _make_batch(base: BaseModel, num_rows: int, num_tokens: int) -> dict[str, torch.Tensor]:
    """Rows of random tokens, all of one length, with answers of four tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(10, base.model.config.vocab_size - 10, (num_rows, num_tokens), generator=generator).tolist()
    rows = [{"prompt_ids": row[:-4], "answer_ids": row[-4:]} for row in tokens]
    return AnswerCollator(base.tokenizer, is_seq2seq=base.kind == "seq2seq")(rows)


def make_parent(source: str, rank: int, folder: Path) -> None:
    """An adapter with something in every slot, so that there is a core to keep."""
    base = load_base(source, HomeSettings().cache_dir)
    model = attach_adapter(base.model, AdapterConfig(rank=rank), seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            scale = torch.logspace(-2, -4, parameter.shape[1])
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    save_adapter(model, folder, MethodState(strategy="seq_lora", stores="nothing"), base_name=base.name)


def measure_peak(variant: str, source: str, parent: Path, num_rows: int, num_tokens: int) -> float:
    """The peak memory of a process that takes three steps, in MiB."""
    stepper = Stepper(variant, source, parent, num_rows, num_tokens)
    for _ in range(3):
        stepper.step()
    return peak_bytes() / 2**20


def ratios_of(values: list[float], others: list[float]) -> tuple[float, list[float]]:
    """The median of paired ratios; their mean with its 95 % interval."""
    ratios = [value / other for value, other in zip(values, others, strict=True)]
    interval = paired_interval(ratios, [0.0] * len(ratios))
    return statistics.median(ratios), [interval.mean, interval.low, interval.high]


@app.command()
def cost(
    base: Base = DEFAULT_BASE,
    steps: Annotated[int, typer.Option(help="Steps of each variant that count.")] = 30,
    batch_size: BatchSize = 8,
    tokens: Tokens = 128,
    rank: Annotated[int, typer.Option(help="Rank of the adapter.")] = 16,
    out: Out = RESULTS / "step_cost.json",
) -> None:
    """Step times of every variant and their ratios to plain LoRA's (median, paired 95 % interval), and peak memory."""
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as work:
        parent = Path(work)
        make_parent(base, rank, parent)
        peaks = {name: alone(measure_peak, name, base, parent, batch_size, tokens) for name in VARIANTS}
        steppers = {name: Stepper(name, base, parent, batch_size, tokens) for name in VARIANTS}
        seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
        order = random.Random(0)
        for i in range(steps + NUM_WARM_UP):
            for name in order.sample(list(VARIANTS), len(VARIANTS)):
                taken = steppers[name].step()
                if i >= NUM_WARM_UP:
                    seconds[name].append(taken)
    variants = {}
    for name in VARIANTS:
        median_ratio, mean_ratio = ratios_of(seconds[name], seconds[PLAIN])
        variants[name] = {
            "median_step_seconds": statistics.median(seconds[name]),
            "median_of_paired_ratios": median_ratio,
            "mean_of_paired_ratios_ci95": mean_ratio,
            "peak_memory_mib": peaks[name],
            "peak_memory_ratio": peaks[name] / peaks[PLAIN],
        }
    write_result(
        out,
        {
            "base": base,
            "num_steps": steps,
            "batch": [batch_size, tokens],
            "rank": rank,
            "threads": torch.get_num_threads(),
            "variants": variants,
        },
    )


def old_task(number: int) -> TaskSchema:
    """A task that asks in its own words."""
    labels = tuple(f"{word} {number}" for word in ("refund", "delivery", "question", "complaint"))
    return TaskSchema(name=f"old-{number}", labels=labels, instruction=f"Sort the message as desk {number} would.")


def adapt(num_old: int, base: str, parent: Path, steps: int) -> dict[str, float]:
    """The figures of one training after so many old tasks."""
    disable_progress_bars()
    lines = (EXAMPLES / "bank" / "train.jsonl").read_text().splitlines()
    rows = Dataset.from_list([{"input": row["text"], "output": row["label"]} for row in map(json.loads, lines)])
    labels = tuple(sorted(set(rows["output"])))
    setup = TrainingSetup(
        strategy="deal",
        task=TaskSchema(name="bank", labels=labels, instruction="What is it about?"),
        adapter=AdapterConfig(),
        method=MethodConfig(),
        train=TrainConfig(max_steps=steps, checkpoint_steps=0),
        old_tasks=tuple(old_task(number) for number in range(num_old)),
    )
    loaded = load_base(base, HomeSettings().cache_dir)
    with tempfile.TemporaryDirectory() as work:
        started = time.perf_counter()
        train_into(Path(work) / "version", loaded, rows, setup, parent)
        seconds = time.perf_counter() - started
        size = sum(file.stat().st_size for file in Path(work).glob("version/*.safetensors"))
    return {"seconds": seconds, "peak_memory_mib": peak_bytes() / 2**20, "adapter_bytes": size}


@app.command()
def number_of_tasks(
    base: Base = DEFAULT_BASE,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 40,
    measurements: Annotated[int, typer.Option(help="Trainings of each.")] = 5,
    out: Out = RESULTS / "number_of_tasks.json",
) -> None:
    """Time, peak memory and adapter of an arrival after 49 tasks and after one, in turns, and their paired ratios."""
    runs: dict[int, list[dict[str, float]]] = {SECOND: [], FIFTIETH: []}
    order = random.Random(0)
    with tempfile.TemporaryDirectory() as parent:
        make_parent(base, AdapterConfig().rank, Path(parent))
        for _ in range(measurements):
            for num_old in order.sample(list(runs), len(runs)):
                runs[num_old].append(alone(adapt, num_old, base, Path(parent), steps))
    result: dict[str, Any] = {"base": base, "num_steps": steps, "num_measurements": measurements}
    for name in ("seconds", "peak_memory_mib", "adapter_bytes"):
        second, fiftieth = ([run[name] for run in runs[num_old]] for num_old in (SECOND, FIFTIETH))
        median_ratio, mean_ratio = ratios_of(fiftieth, second)
        result[name] = {
            "median_of_the_second": statistics.median(second),
            "median_of_the_fiftieth": statistics.median(fiftieth),
            "median_ratio": median_ratio,
            "mean_ratio_ci95": mean_ratio,
        }
    write_result(out, result)


if __name__ == "__main__":
    app()
