"""What a training step spends its time on: PyTorch's profiler over steps of plain LoRA and of DEAL.

    python -m benchmarks.step_profile

The steps are those of benchmarks.step_cost. Shares are of the processor's time in each operator itself, without what it
calls.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from datasets import disable_progress_bars
from torch.profiler import ProfilerActivity, profile

from benchmarks.output import write_result
from benchmarks.step_cost import PLAIN, Stepper, make_batch, make_parent
from deal_core.base_model.sources import DEFAULT_BASE

NUM_OPERATORS = 12


def profile_steps(variant: str, base: str, parent: Path, num_rows: int, num_tokens: int, steps: int) -> dict[str, Any]:
    """Milliseconds of a step, and the operators that it spends most in."""
    stepper = Stepper(variant, base, parent, num_tokens)
    batch = make_batch(stepper.base, num_rows, num_tokens)
    stepper.step(batch)  # warms allocators and kernels up
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            stepper.step(batch)
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    return {
        "milliseconds_per_step": total / 1000 / steps,
        "operators": [
            {"name": event.key, "share": event.self_cpu_time_total / total, "calls_per_step": event.count / steps}
            for event in events[:NUM_OPERATORS]
        ],
    }


def main(
    base: Annotated[str, typer.Option(help="Base model.")] = DEFAULT_BASE,
    steps: Annotated[int, typer.Option(help="Steps under the profiler.")] = 3,
    batch_size: Annotated[int, typer.Option(help="Rows per step.")] = 8,
    tokens: Annotated[int, typer.Option(help="Tokens per row.")] = 128,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("benchmarks/results/step_profile.json"),
) -> None:
    """Print and write where the time of a step goes."""
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as parent:
        make_parent(base, 16, Path(parent))
        found = {name: profile_steps(name, base, Path(parent), batch_size, tokens, steps) for name in (PLAIN, "deal")}
    write_result(out, {"base": base, "batch": [batch_size, tokens], "num_steps": steps, **found})


if __name__ == "__main__":
    typer.run(main)
