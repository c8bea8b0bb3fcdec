"""What DEAL costs over plain LoRA, by its rehearsal and by its core alone: step time and peak memory, interleaved.

Plain LoRA also with PyTorch's own backward pass of attention, which `base_model.cpu_attention` replaces on a CPU.

    python -m benchmarks.step_cost

One trainer per variant, each on a base model of its own, take turns: one optimiser step each on the same batch, in
random order, so that whatever else the machine does falls on all. Peak memory is measured in one process per variant.
The questions of the rehearsal are as long as the rows of the batch.
"""

from __future__ import annotations

import multiprocessing
import random
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from datasets import Dataset, disable_progress_bars

from benchmarks.output import write_result
from deal_core.adapter.state import attach_adapter, load_adapter, load_method_state, save_adapter
from deal_core.base_model.load import BaseModel, load_base
from deal_core.base_model.sources import DEFAULT_BASE
from deal_core.config import AdapterConfig, TrainConfig
from deal_core.data.collate import AnswerCollator, answer_logits
from deal_core.data.schema import TaskSchema
from deal_core.evaluation.metrics import paired_interval
from deal_core.method_config import MethodConfig, RehearsalConfig
from deal_core.strategies import make_strategy
from deal_core.strategies.strategy import MethodState, Strategy, TaskContext
from infra.settings import HomeSettings

PLAIN = "seq_lora"
FUSED = "seq_lora_fused_attention"
VARIANTS = {
    PLAIN: ("seq_lora", MethodConfig()),
    FUSED: ("seq_lora", MethodConfig()),
    "deal_without_rehearsal": ("deal", MethodConfig(rehearsal=RehearsalConfig(texts="none"))),
    "deal": ("deal", MethodConfig()),
}
OLD_TASK = TaskSchema(name="old", labels=("first", "second"), instruction="Which of the two is it?")


def make_batch(base: BaseModel, num_rows: int, num_tokens: int) -> dict[str, torch.Tensor]:
    """Rows of random tokens, all of one length, with answers of four tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(10, base.model.config.vocab_size - 10, (num_rows, num_tokens), generator=generator).tolist()
    rows = Dataset.from_list([{"prompt_ids": row[:-4], "answer_ids": row[-4:]} for row in tokens])
    return AnswerCollator(base.tokenizer, is_seq2seq=base.kind == "seq2seq")(list(rows))


class Stepper:
    """One variant on a base model of its own, with the parent's adapter, taking optimiser steps."""

    def __init__(self, variant: str, source: str, parent: Path, num_tokens: int) -> None:
        strategy, method = VARIANTS[variant]
        self.base = load_base(source, HomeSettings().cache_dir)
        if variant == FUSED:
            self.base.model.set_attn_implementation("sdpa")
        self.model = load_adapter(self.base.model, parent, is_trainable=True)
        self.strategy: Strategy = make_strategy(strategy, method, 0)
        rows = Dataset.from_list([{"input": f"{i} is a number. " * num_tokens} for i in range(16)])
        context = TaskContext(
            base=self.base, task=TaskSchema(name="new"), rows=rows, encoded=rows, old_tasks=(OLD_TASK,),
            adapter=AdapterConfig(), train=TrainConfig(max_prompt_tokens=num_tokens - 2),
        )  # fmt: skip
        self.strategy.prepare(self.model, load_method_state(parent), context)
        self._rehearsal = self.strategy.rehearsal()
        self._num_steps = 0
        self.optimizer = torch.optim.AdamW(list(self.strategy.parameters()), lr=5e-4, weight_decay=0.0)

    def step(self, batch: dict[str, torch.Tensor]) -> float:
        """Forward, backward, the strategy's hooks, clip and AdamW; return the seconds it took."""
        started = time.perf_counter()
        logits = answer_logits(self.model, batch)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch["labels"].flatten()).backward()
        rehearsed = self._rehearsal and self._rehearsal.loss(self.model, self._num_steps)
        if rehearsed is not None:
            rehearsed.backward()
        self._num_steps += 1
        self.strategy.before_step()
        penalty = self.strategy.penalty()
        if penalty is not None:
            penalty.backward()
        torch.nn.utils.clip_grad_norm_(self.strategy.parameters(), 1.0)
        self.optimizer.step()
        self.strategy.after_step()
        self.model.zero_grad()
        self.optimizer.zero_grad()
        return time.perf_counter() - started


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


def measure_peak(variant: str, source: str, parent: Path, num_rows: int, num_tokens: int, queue: object) -> None:
    """Put the peak resident memory of a process that takes three steps, in MiB."""
    stepper = Stepper(variant, source, parent, num_tokens)
    batch = make_batch(stepper.base, num_rows, num_tokens)
    for _ in range(3):
        stepper.step(batch)
    queue.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)  # type: ignore[attr-defined]


def compare(seconds: list[float], plain_seconds: list[float], peak: float, plain_peak: float) -> dict[str, object]:
    """A variant's figures beside plain LoRA's."""
    ratios = [ours / plain for ours, plain in zip(seconds, plain_seconds, strict=True)]
    interval = paired_interval(ratios, [0.0] * len(ratios))
    return {
        "median_step_seconds": statistics.median(seconds),
        "median_of_paired_ratios": statistics.median(ratios),
        "mean_of_paired_ratios_ci95": [interval.mean, interval.low, interval.high],
        "peak_memory_mib": peak,
        "peak_memory_ratio": peak / plain_peak,
    }


def main(
    base: Annotated[str, typer.Option(help="Base model.")] = DEFAULT_BASE,
    steps: Annotated[int, typer.Option(help="Steps of each variant that count.")] = 30,
    batch_size: Annotated[int, typer.Option(help="Rows per step.")] = 8,
    tokens: Annotated[int, typer.Option(help="Tokens per row.")] = 128,
    rank: Annotated[int, typer.Option(help="Rank of the adapter.")] = 16,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("benchmarks/results/step_cost.json"),
) -> None:
    """Print and write the ratio of step times (median, paired 95 % CI) and of peak memory."""
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as work:
        parent = Path(work)
        make_parent(base, rank, parent)
        peaks = {}
        context = multiprocessing.get_context("spawn")
        for name in VARIANTS:
            queue = context.Queue()
            process = context.Process(target=measure_peak, args=(name, base, parent, batch_size, tokens, queue))
            process.start()
            process.join()
            if process.exitcode != 0:
                raise typer.Exit(1)
            peaks[name] = queue.get()
        steppers = {name: Stepper(name, base, parent, tokens) for name in VARIANTS}
        batch = make_batch(steppers["deal"].base, batch_size, tokens)
        seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
        order = random.Random(0)
        for i in range(steps + 3):
            for name in order.sample(list(VARIANTS), len(VARIANTS)):
                taken = steppers[name].step(batch)
                if i >= 3:  # the first steps warm allocators and kernels up
                    seconds[name].append(taken)
    result = {
        "base": base,
        "num_steps": steps,
        "batch": [batch_size, tokens],
        "rank": rank,
        "threads": torch.get_num_threads(),
        "variants": {name: compare(seconds[name], seconds[PLAIN], peaks[name], peaks[PLAIN]) for name in VARIANTS},
    }
    write_result(out, result)


if __name__ == "__main__":
    typer.run(main)
