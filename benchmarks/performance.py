"""Write docs/performance.md from the stored results: `python -m benchmarks.performance`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from benchmarks.report import read

NAMES = ("step_cost", "sft_trainer", "evaluation", "adaptation", "command_start", "number_of_tasks",
         "evaluation_budget", "ingest", "large_shapes", "fan_out", "step_profile")  # fmt: skip
"""Results on the page, each written by the benchmark of its name."""


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
    page.write_text(templates.get_template("performance.md.j2").render(found))
    typer.echo(f"{page} written")


if __name__ == "__main__":
    typer.run(main)
