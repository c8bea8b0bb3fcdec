"""Write docs/performance.md from the stored results: `python -m benchmarks.performance`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.output import RESULTS, read, templates

NAMES = (
    "step_cost",
    "sft_trainer",
    "sft_long_prompt",
    "evaluation",
    "evaluation_fp32",
    "evaluation_texts",
    "adaptation",
    "command_start",
    "number_of_tasks",
    "evaluation_budget",
    "ingest",
    "large_shapes",
    "fan_out",
    "landing",
    "serving",
    "serving_log",
    "front",
    "monitoring",
    "label_noise",
    "two_lineages",
    "launches",
)
"""Results on the page."""
FEW = 4
"""Of fewer values the bootstrap's interval is their smallest to their largest: it says nothing of noise."""


def spread(interval: Sequence[float], count: int, digits: int) -> str:
    """The interval of a mean of so many values; of few their range.

    Example:
        >>> spread((1.5, 1.25, 1.75), 3, 2), spread((1.5, 1.25, 1.75), 20, 2)
        ('range of 3: 1.25 to 1.75', 'n = 20, 95 % interval of the mean 1.25 to 1.75')
    """
    _, low, high = (f"{value:.{digits}f}".replace("-", "−") for value in interval)
    return (
        f"range of {count}: {low} to {high}"
        if count < FEW
        else (f"n = {count}, 95 % interval of the mean {low} to {high}")
    )


def not_above(limit: float, interval: Sequence[float], count: int) -> str:
    """Whether a mean is above its limit by more than noise; few values on both sides of it do not tell.

    Example:
        >>> not_above(1, (1.5, 1.25, 1.75), 3), not_above(1, (1.5, 0.75, 1.75), 3), not_above(1, (1.5, 0.75, 1.75), 20)
        ('**missed**', 'n = 3, not told apart', 'reached')
    """
    _, low, high = interval
    if low > limit:
        return "**missed**"
    return f"n = {count}, not told apart" if count < FEW and high > limit else "reached"


def main(
    results: Annotated[Path, typer.Option(help="Folder of the stored results.")] = RESULTS,
    page: Annotated[Path, typer.Option(help="Page to write.")] = Path("docs/performance.md"),
) -> None:
    """Fill the page."""
    found = {name: read(results / f"{name}.json") for name in NAMES}
    template = templates().get_template("performance.md.j2")
    page.write_text(template.render(found, spread=spread, not_above=not_above))
    typer.echo(f"{page} written")


if __name__ == "__main__":
    typer.run(main)
