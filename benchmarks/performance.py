"""Write docs/performance.md from the stored results: `python -m benchmarks.performance`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from benchmarks.report import read
from benchmarks.sft_trainer import REFERENCE

NAMES = ("step_cost", "sft_trainer", "evaluation", "adaptation", "command_start", "number_of_tasks",
         "evaluation_budget", "ingest", "large_shapes", "fan_out", "step_profile", "landing")  # fmt: skip
"""Results on the page, each written by the benchmark of its name."""


def alike(variant: Mapping[str, Any]) -> bool:
    """Whether its held-out loss is not above SFTTrainer's beyond the noise of the seeds."""
    _, low, _ = variant[f"mean_held_out_loss_minus_{REFERENCE}_ci95"]
    return bool(low <= 0)


def main(
    results: Annotated[Path, typer.Option(help="Folder of the stored results.")] = Path("benchmarks/results"),
    page: Annotated[Path, typer.Option(help="Page to write.")] = Path("docs/performance.md"),
) -> None:
    """Fill the page."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip
    found = {name: read(results / f"{name}.json") for name in NAMES}
    page.write_text(templates.get_template("performance.md.j2").render(found, alike=alike))
    typer.echo(f"{page} written")


if __name__ == "__main__":
    typer.run(main)
