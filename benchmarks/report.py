"""Write docs/benchmark.md from the stored results: `python -m benchmarks.report`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

NAMES = {"seq_lora": "plain LoRA", "deal_without_rehearsal": "DEAL without rehearsal", "deal": "DEAL"}
TEMPLATE = Path(__file__).parent / "page.md.in"


def read(path: Path) -> Any:
    """Read a result.

    Raises:
        typer.BadParameter: It is not there.
    """
    if not path.is_file():
        raise typer.BadParameter(f"{path} is not there; run the benchmark that writes it first.")
    return json.loads(path.read_text())


def cost_table(variants: dict[str, Any]) -> str:
    """One line per variant: step and memory, beside plain LoRA."""
    lines = [
        "| variant | step, median | ratio to plain LoRA (95 % CI of the mean) | peak memory | ratio |",
        "|---|---|---|---|---|",
    ]
    for name, cost in variants.items():
        _, low, high = cost["mean_of_paired_ratios_ci95"]
        lines.append(
            f"| {NAMES[name]} | {cost['median_step_seconds']:.3f} s | {cost['median_of_paired_ratios']:.3f} "
            f"({low:.3f} to {high:.3f}) | {cost['peak_memory_mib']:.0f} MiB | {cost['peak_memory_ratio']:.3f} |"
        )
    return "\n".join([*lines, ""])


def main(
    results: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("benchmarks/results"),
    page: Annotated[Path, typer.Option(help="Page to write.")] = Path("docs/benchmark.md"),
) -> None:
    """Fill the page with the stored figures."""
    folder = results / "continual"
    table = (folder / "summary.md").read_text() if (folder / "summary.md").is_file() else ""
    cell = read(next(iter(sorted(folder.glob("deal-*.json"))), folder / "deal-*.json"))["settings"]
    cost = read(results / "step_cost.json")
    page.write_text(
        TEMPLATE.read_text().format(
            rows=cell["rows"],
            batch=cell["train"]["batch_size"],
            rate=cell["train"]["learning_rate"],
            rank=cell["adapter"]["rank"],
            tokens=cell["train"]["max_prompt_tokens"],
            base=cell["base"].split()[0],
            first=cell["test_rows"][0],
            last=cell["test_rows"][1] - 1,
            table=table,
            steps=cost["num_steps"],
            step_rows=cost["batch"][0],
            step_tokens=cost["batch"][1],
            threads=cost["threads"],
            cost_table=cost_table(cost["variants"]),
        )
    )
    typer.echo(f"{page} written")


if __name__ == "__main__":
    typer.run(main)
