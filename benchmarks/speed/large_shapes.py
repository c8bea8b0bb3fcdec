"""What DEAL's own work costs at the shapes of Llama-3.1-8B: once per task, and at every optimiser step.

    OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive python -m benchmarks.speed.large_shapes

The adapter alone is made (32 layers, q_proj 4096×4096 and v_proj 1024×4096, rank 32, fp32); the base model takes no
part in this work. Once per task: balanced form, recycling, and the factors written back. At every step: the gradients
of the factors taken back through the network, with the penalty's, and the factors written anew. Clipping and AdamW are
timed beside it, since plain LoRA pays them too, for as many numbers.

Wall time says how long one waits, on a machine that may have other work; CPU time adds up the threads' own. Threads
that have to wait for each other do so asleep (OMP_WAIT_POLICY), since spinning counts as work where others are busy.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import psutil
import torch
import typer
from torch import nn

from benchmarks.output import RESULTS, Out, write_result
from deal_core.adapter.reparametrize import Reparametrization
from deal_core.adapter.stack import LoraStack, check_rank
from deal_core.method_config import DealConfig

LAYERS, RANK = 32, 32
SHAPES = {"q_proj": (4096, 4096), "v_proj": (1024, 4096)}
LIMIT_TASK_SECONDS, LIMIT_STEP_SECONDS = 5.0, 0.05


def make_stacks() -> list[LoraStack]:
    """An adapter with something in every slot, singular values falling by a factor of a hundred over the slots."""
    generator = torch.Generator().manual_seed(0)
    stacks = []
    for name, (num_out, num_in) in SHAPES.items():
        scale = torch.logspace(-2, -4, RANK)
        a = [nn.Parameter(torch.randn(RANK, num_in, generator=generator) * num_in**-0.5) for _ in range(LAYERS)]
        b = [nn.Parameter(torch.randn(num_out, RANK, generator=generator) * scale) for _ in range(LAYERS)]
        stacks.append(LoraStack(tuple(f"layers.{i}.{name}" for i in range(LAYERS)), tuple(a), tuple(b)))
    return stacks


def timed(call: Callable[[], Any], into: list[tuple[float, float]]) -> Any:
    """Call, and note wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    into.append((time.perf_counter() - wall, time.process_time() - cpu))
    return result


def prepare_task(stacks: list[LoraStack], config: DealConfig) -> Reparametrization:
    """What `Deal.prepare` does with the parent's adapter."""
    check_rank(stacks)
    network = Reparametrization(stacks, config, torch.Generator().manual_seed(0))
    network.synchronise()
    network.materialise()
    return network


def figures(times: list[tuple[float, float]]) -> dict[str, Any]:
    """Medians, smallest and largest, in seconds."""
    walls, cpus = zip(*times, strict=True)
    return {
        "n": len(times),
        "median_wall_seconds": statistics.median(walls),
        "median_cpu_seconds": statistics.median(cpus),
        "min_wall_seconds": min(walls),
        "max_wall_seconds": max(walls),
    }


def measure(config: DealConfig, num_tasks: int, num_steps: int) -> dict[str, Any]:
    """Time both with the threads that torch has now."""
    once: list[tuple[float, float]] = []
    for _ in range(num_tasks + 1):
        stacks = make_stacks()
        network = timed(lambda given=stacks: prepare_task(given, config), once)
    pieces: dict[str, list[tuple[float, float]]] = {
        name: [] for name in ("method", "pull_back", "materialise", "clip", "adamw")
    }
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-4, weight_decay=0.0)
    generator = torch.Generator().manual_seed(1)
    for stack in stacks:
        for param in (*stack.a_params, *stack.b_params):
            param.grad = torch.randn(param.shape, generator=generator) * 1e-3
    for _ in range(num_steps + 3):
        timed(lambda: network.pull_back(), pieces["pull_back"])
        timed(lambda: torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0), pieces["clip"])
        timed(optimizer.step, pieces["adamw"])
        timed(network.materialise, pieces["materialise"])
        (wall, cpu), (wall_after, cpu_after) = pieces["pull_back"][-1], pieces["materialise"][-1]
        pieces["method"].append((wall + wall_after, cpu + cpu_after))
    # the first ones warm allocators and kernels up
    return {
        "threads": torch.get_num_threads(),
        "load_average_1min": psutil.getloadavg()[0],
        "once_per_task": figures(once[1:]),
        "every_step": {name: figures(times[3:]) for name, times in pieces.items()},
        "core_slots_per_module": statistics.mean(network.num_core_slots.values()),
    }


def main(
    tasks: Annotated[int, typer.Option(help="How often the work of a task is timed.")] = 5,
    steps: Annotated[int, typer.Option(help="Steps that count.")] = 30,
    core: Annotated[str, typer.Option(help="deal.core: soft or frozen.")] = "soft",
    out: Out = RESULTS / "large_shapes.json",
) -> None:
    """Time both with one thread and with all that torch was given, and write medians with n."""
    config = DealConfig(core=core)  # type: ignore[arg-type]  # DealConfig itself checks it
    counts = sorted({1, torch.get_num_threads()})
    runs = []
    for count in counts:
        torch.set_num_threads(count)
        runs.append(measure(config, tasks, steps))
    result = {
        "shapes": {name: list(shape) for name, shape in SHAPES.items()},
        "layers": LAYERS,
        "rank": RANK,
        "core": core,
        "dtype": "fp32",
        "device": "cpu",
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "limits": {"task_seconds": LIMIT_TASK_SECONDS, "step_seconds": LIMIT_STEP_SECONDS},
        "runs": runs,
    }
    write_result(out, result)


if __name__ == "__main__":
    typer.run(main)
