"""The accuracy matrix as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, MaxNLocator

from deal_core.evaluation.metrics import AccuracyMatrix
from infra.report.style import COLOURS, MARKERS, MUTED, new_figure, say_empty, spread, tidy

COLOUR_MAP = colormaps["YlGnBu"]
"""Light to dark in one direction, also in grey."""
GAP = 0.12
"""Between the base model's row and the versions', in rows."""
DARK_FROM = 68.0
"""Per cent from which the numbers are white."""


def accuracy_heatmap(matrix: AccuracyMatrix) -> Figure:
    """Tasks in columns, the base model and then the versions in rows, values in per cent.

    The cell of the task that a version was trained on has a frame; cells that were not measured are hatched.
    """
    num_rows, num_tasks = len(matrix.rows) + 1, max(len(matrix.tasks), 1)
    cell = min(0.5, 24 / num_rows)
    longest = max((len(name) for name in (*matrix.tasks, *matrix.trained)), default=4)
    width = 2.4 + 0.08 * longest + 0.95 * num_tasks
    figure = new_figure(max(width, 4.2), 1.5 + 0.05 * longest + cell * num_rows)
    axes = figure.subplots()
    if not matrix.rows:
        say_empty(axes, "no version yet")
        return figure
    draw_heatmap(axes, matrix, font_size=min(10.0, 22 * cell))
    axes.set_title(f"Accuracy in %{describe(matrix, ' · ')}", fontsize=11, loc="left", pad=12)
    figure.supxlabel("framed: the task a version was trained on; hatched: not measured", fontsize=8, color=MUTED)
    colours = ScalarMappable(Normalize(0, 100), COLOUR_MAP)
    bar = figure.colorbar(colours, ax=axes, shrink=min(1.0, 4 / (cell * num_rows)), pad=0.02, ticks=range(0, 101, 25))
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, length=0)
    return figure


def draw_heatmap(axes: Axes, matrix: AccuracyMatrix, *, font_size: float = 10.0) -> None:
    """Draw the matrix, its base row first, into axes that exist."""
    values = 100 * numpy.array([matrix.base, *matrix.rows], dtype=float)
    tops = [-GAP, *range(1, len(values))]
    for (row, column), value in numpy.ndenumerate(values):
        cell = Rectangle((column, tops[row]), 1, 1, edgecolor="white", linewidth=2)
        axes.add_patch(cell)
        if numpy.isnan(value):
            cell.set(facecolor="#F4F4F4", edgecolor="#CCCCCC", hatch="///", linewidth=0)
            continue
        cell.set_facecolor(COLOUR_MAP(value / 100))
        colour = "white" if value >= DARK_FROM else "black"
        axes.text(column + 0.5, tops[row] + 0.5, f"{value:.1f}", ha="center", va="center", fontsize=font_size,
                  color=colour)  # fmt: skip
    for version, task in enumerate(matrix.trained, start=1):
        corner = (matrix.tasks.index(task), version)
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=COLOURS[1], linewidth=2.4, zorder=3,
                                 clip_on=False))  # fmt: skip
    axes.set_xlim(0, len(matrix.tasks))
    axes.set_ylim(len(values), -GAP)
    name_columns(axes, matrix.tasks, offset=0.5)
    names = ["base model", *(f"{number}  after {task}" for number, task in enumerate(matrix.trained, start=1))]
    axes.set_yticks([top + 0.5 for top in tops], names, fontsize=min(9.0, font_size))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def name_columns(axes: Axes, names: Sequence[str], *, offset: float = 0.0) -> None:
    """Write the tasks' names below their columns, slanted where they would run into each other."""
    axes.set_xticks([column + offset for column in range(len(names))], names, fontsize=9)
    if len(names) > 6 or max(map(len, names)) > 12:
        for label in axes.get_xticklabels():
            label.set(ha="right", rotation=35, rotation_mode="anchor")


def accuracy_over_versions(matrix: AccuracyMatrix) -> Figure:
    """One line a task, from the version that first learned it to the last."""
    figure = new_figure(7.5, 4.2)
    axes = figure.subplots()
    if not matrix.rows:
        say_empty(axes, "no version yet")
        return figure
    draw_lines(axes, matrix)
    axes.set_title(f"Accuracy of every task, version by version{describe(matrix, ' · ')}", fontsize=11, loc="left")
    return figure


def draw_lines(axes: Axes, matrix: AccuracyMatrix) -> None:
    """Draw a line a task with its name at the end, into axes that exist."""
    last = len(matrix.rows)
    ends = []
    for column, task in enumerate(matrix.tasks):
        first = matrix.trained.index(task)
        values = [100 * float(row[column] or 0) for row in matrix.rows[first:]]
        _mark(axes, column, list(range(first + 1, last + 1)), values)
        ends.append(values[-1])
    tidy(axes)
    axes.set_ylim(0, 100)
    axes.set_xlim(0.9, max(last, 1.1))
    for column, height in enumerate(spread(ends, gap=5.5)):
        beside = axes.get_yaxis_transform()
        _mark(axes, column, [1.03], [height], transform=beside)
        axes.text(1.05, height, f"{ends[column]:.1f}  {matrix.tasks[column]}", transform=beside, va="center",
                  fontsize=9, color="#333333")  # fmt: skip
    axes.xaxis.set_major_locator(FixedLocator([1]) if last == 1 else MaxNLocator(integer=True))
    axes.set_xlabel("version", color=MUTED)
    axes.set_ylabel("accuracy, %", color=MUTED)


def _mark(axes: Axes, column: int, steps: list[Any], values: list[float], **options: Any) -> None:
    colour, marker = COLOURS[column % len(COLOURS)], MARKERS[column % len(MARKERS)]
    axes.plot(steps, values, color=colour, marker=marker, markersize=5, linewidth=1.8, clip_on=False, **options)


def describe(matrix: AccuracyMatrix, separator: str = "") -> str:
    """Average accuracy and forgetting in words, after the separator; forgetting only where it is defined."""
    parts = []
    if matrix.average_accuracy is not None:
        parts.append(f"average {100 * matrix.average_accuracy:.1f}")
    if matrix.forgetting is not None:
        parts.append(f"forgetting {100 * matrix.forgetting:.1f}")
    return separator + ", ".join(parts) if parts else ""
