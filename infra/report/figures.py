"""The figures of a run and of a sequence of tasks: accuracy matrix, training, result.

Colour-blind readers can tell the colours apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, MaxNLocator

from deal_core.evaluation.accuracy_matrix import AccuracyMatrix
from deal_core.evaluation.interval import score_text, sureness_text
from deal_core.safe_text import shorten

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#444444")
"""Okabe and Ito's palette, without its yellow, which is hardly visible on white."""
MARKERS = "osD^vPX*"
MUTED = "#666666"
COLOUR_MAP = colormaps["YlGnBu"]
"""Values from low to high are light to dark, also in a grey print."""
LIGHT_TO, DARK_FROM = 0.45, 0.66
"""Cells below half have the map's colours up to the first, the others those from the second on. On the colours in
between, neither black nor white figures are easy to read."""
GAP = 0.12
"""Space between the base model's row and the versions' rows, in rows."""
INCHES_PER_NAME = 0.2
"""Height that the name of a task takes beside the lines."""
HIGHEST_NAME = 97.0
"""Position of the topmost name on an axis of 100, below the title."""
MAX_NAME = 40
"""Characters of a task's name beside its line."""


def new_figure(width: float, height: float) -> Figure:
    """Return an empty white figure that arranges its axes itself. Sizes are in inches."""
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def save_png(figure: Figure, path: Path) -> None:
    """Write the figure as a PNG with 150 dots per inch."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=150)


def tidy(axes: Axes) -> None:
    """Remove the frame, and draw a light grid behind the values."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(MUTED)
    axes.tick_params(colors="#333333", labelsize=9)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)


def say_empty(axes: Axes, text: str) -> None:
    """Write why there are no values, and hide the empty axes."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, ha="center", va="center", color=MUTED, transform=axes.transAxes)


def spread(positions: Sequence[float], gap: float) -> list[float]:
    """Move positions apart to at least `gap`, in their order. Used for labels at the ends of lines."""
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    moved = list(positions)
    for before, here in pairwise(order):
        moved[here] = max(moved[here], moved[before] + gap)
    excess = (max(moved) - max(positions)) / 2 if moved else 0.0
    return [position - excess for position in moved]


def accuracy_over_versions(matrix: AccuracyMatrix, versions: Sequence[str] = ()) -> Figure:
    """Draw one line per task, from the version that first learned the task to the last version.

    Without names, the versions are numbered from 1.
    """
    shown = [column for column, value in enumerate(matrix.rows[-1] if matrix.rows else ()) if value is not None]
    tall = max(4.2, 1.0 + INCHES_PER_NAME * len(shown))
    figure = new_figure(7.5, tall)
    axes = figure.subplots()
    if not matrix.rows:
        say_empty(axes, "no version yet")
        return figure
    last = len(matrix.rows)
    ends = []
    for column in shown:  # earlier test rows that were forgotten have no value
        first = matrix.first_versions()[column]
        rows = enumerate(matrix.rows[first:], first + 1)
        points = {version: 100 * value for version, row in rows if (value := row[column]) is not None}
        _mark(axes, column, list(points), list(points.values()))
        ends.append(points[last])
    tidy(axes)
    axes.set_ylim(0, 100)
    axes.set_xlim(0.9, max(last, 1.1))
    heights = spread(ends, gap=min(5.5 * 4.2 / tall, HIGHEST_NAME / len(shown)))
    beyond = min(0.0, HIGHEST_NAME - max(heights)) or max(0.0, -min(heights))  # names stay beside the lines
    for column, end, height in zip(shown, ends, (height + beyond for height in heights), strict=True):
        beside, name = axes.get_yaxis_transform(), shorten(matrix.tasks[column], MAX_NAME)
        _mark(axes, column, [1.03], [height], transform=beside)
        told = score_text(end / 100, matrix.cells[-1][column].num_rows)
        axes.text(1.05, height, f"{told}  {name}", transform=beside, va="center", fontsize=9, color="#333333")
    axes.xaxis.set_major_locator(FixedLocator([1]) if last == 1 else MaxNLocator(integer=True))
    axes.set_xlabel("version", color=MUTED)
    axes.set_ylabel("accuracy, %", color=MUTED)
    if versions:  # many versions get names at some steps only
        ticks = MaxNLocator(nbins=12, integer=True).tick_values(1, max(len(versions), 2))
        steps = [int(tick) for tick in ticks if 1 <= tick <= len(versions)]
        axes.set_xticks(steps, [versions[step - 1] for step in steps])
    axes.set_title(f"Accuracy of every task, version by version{describe(matrix, ' · ')}", fontsize=11, loc="left")
    return figure


def _mark(axes: Axes, column: int, steps: list[Any], values: list[float], **options: Any) -> None:
    colour, marker = COLOURS[column % len(COLOURS)], MARKERS[column % len(MARKERS)]
    axes.plot(steps, values, color=colour, marker=marker, markersize=5, linewidth=1.8, clip_on=False, **options)


def describe(matrix: AccuracyMatrix, separator: str = "") -> str:
    """Return the separator and the defined ones of average accuracy and forgetting; empty if both are undefined."""
    parts = []
    if matrix.average_accuracy is not None:
        parts.append(f"average {100 * matrix.average_accuracy:.1f}")
    if matrix.forgetting is not None:
        parts.append(f"forgetting {100 * matrix.forgetting:.1f}")
    return separator + ", ".join(parts) if parts else ""


def loss_curve(
    losses: Sequence[tuple[int, float]], validation: Sequence[tuple[int, float]] = (), kept_step: int | None = None
) -> Figure:
    """Draw the training loss over optimiser steps, from ordered pairs; from 60 points on also its running mean.

    `validation` is the loss of rows that were held back, and `kept_step` the step that they chose.
    """
    figure = new_figure(7.5, 3.6)
    axes = figure.subplots()
    points = [(step, loss) for step, loss in losses if math.isfinite(loss)]
    if not points:
        say_empty(axes, "no loss was logged")
        return figure
    steps, values = (numpy.array(column) for column in zip(*points, strict=True))
    many = len(points) >= 60
    style: dict[str, Any] = {"alpha": 0.35} if many else {"marker": "o", "markersize": 3.5}
    axes.plot(steps, values, color=COLOURS[0], linewidth=1.2, **style)
    if many:
        half = len(points) // 30
        smooth = numpy.convolve(values, numpy.ones(2 * half + 1) / (2 * half + 1), "valid")
        axes.plot(steps[half : len(steps) - half], smooth, color=COLOURS[0], linewidth=2.2)
        axes.set_title(f"line: running mean of {2 * half + 1} points", fontsize=9, loc="right", color=MUTED)
    highest = float(values.max())
    if validation:
        highest = max(highest, *(loss for _, loss in validation))
        axes.plot(*zip(*validation, strict=True), color=COLOURS[1], marker="s", markersize=4.5, label="held-back rows")
        if kept_step is not None:
            axes.axvline(kept_step, color=MUTED, linestyle=":", label=f"kept: step {kept_step}")
        axes.legend(frameon=False, fontsize=9)
    tidy(axes)
    axes.set_ylim(0, highest * 1.06 or 1)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("optimiser step", color=MUTED)
    axes.set_ylabel("loss", color=MUTED)
    axes.set_title("Training loss", fontsize=11, loc="left")
    return figure


def result_figure(
    matrix: AccuracyMatrix, rival: AccuracyMatrix | None = None, *, name: str = "deal", rival_name: str = "seq_lora"
) -> Figure:
    """Draw the accuracy matrix. Its right half is the matrix of a rival, or the final accuracy of each task.

    Each matrix has at least one version, and both have the same tasks in the same order. The title says what is left in
    the end.
    """
    panel = max(3.6, 0.62 * len(matrix.tasks))
    figure = new_figure(1.4 + panel * 2.1, 2.9 + 0.4 * len(matrix.rows))
    left, right = figure.subplots(1, 2, width_ratios=(1.0, 1.1 if rival is None else 1.0))
    _draw_heatmap(left, matrix, name)
    if rival is None:
        _draw_bars(right, matrix, name)
    else:
        _draw_heatmap(right, rival, rival_name)
        right.set_yticks([])
    shown = {name: matrix} if rival is None else {name: matrix, rival_name: rival}
    means = {name: shown[name].average_accuracy for name in shown}
    told = ", ".join(name if mean is None else f"{name} {100 * mean:.1f} %" for name, mean in means.items())
    title = f"Mean accuracy after {len(matrix.rows)} arrival{'s' * (len(matrix.rows) > 1)}: {told}"
    figure.suptitle(title, fontsize=13, fontweight="bold", x=0.01, ha="left")
    return figure


def _draw_heatmap(axes: Axes, matrix: AccuracyMatrix, name: str) -> None:
    """Draw the accuracy matrix in per cent: a column per task, a row for the base model, then a row per version.

    A version's cell for its new task has a frame. Cells that were not measured are hatched.
    """
    values = 100 * numpy.array([matrix.base, *matrix.rows], dtype=float)
    tops = [-GAP, *range(1, len(values))]
    for (row, column), value in numpy.ndenumerate(values):
        cell = Rectangle((column, tops[row]), 1, 1, edgecolor="white", linewidth=2)
        axes.add_patch(cell)
        if numpy.isnan(value):
            cell.set(facecolor="#F4F4F4", edgecolor="#CCCCCC", hatch="///", linewidth=0)
            continue
        is_dark = value >= 50
        place = DARK_FROM + (1 - DARK_FROM) * (value - 50) / 50 if is_dark else LIGHT_TO * value / 50
        cell.set_facecolor(COLOUR_MAP(place))
        colour = "white" if is_dark else "black"
        at: dict[str, Any] = {"x": column + 0.5, "y": tops[row] + 0.5, "ha": "center", "color": colour}
        if told := sureness_text(*matrix.cells[row][column]):
            axes.text(s=f"{value:.1f}", va="bottom", fontsize=10, **at)
            axes.text(s=told, va="top", fontsize=6.5, **at)
        else:
            axes.text(s=f"{value:.1f}", va="center", fontsize=10, **at)
    for version, task in enumerate(matrix.learned, start=1):
        is_one = task in matrix.tasks  # a consolidation learned all tasks, so its frame is around the row
        corner = (matrix.tasks.index(task) if is_one else 0, version)
        frame = Rectangle(
            corner,
            1 if is_one else len(matrix.tasks),
            1,
            fill=False,
            edgecolor=COLOURS[1],
            linewidth=2.4,
            zorder=3,
            clip_on=False,
        )
        axes.add_patch(frame)
    axes.set_xlim(0, len(matrix.tasks))
    axes.set_ylim(len(values), -GAP)
    _name_columns(axes, matrix.tasks, offset=0.5)
    names = ["base model", *(f"{number}  after {task}" for number, task in enumerate(matrix.learned, start=1))]
    axes.set_yticks([top + 0.5 for top in tops], names, fontsize=9)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(f"{name}\n", fontsize=12, fontweight="bold", loc="left")
    axes.text(0, 1.03, describe(matrix), transform=axes.transAxes, fontsize=9.5, color=MUTED)


def _draw_bars(axes: Axes, matrix: AccuracyMatrix, name: str) -> None:
    """Draw the accuracy of every task at the end, beside the base model's."""
    size = 8 if len(matrix.tasks) <= 4 else 6
    sides = (("base model", "#BBBBBB", matrix.base, -0.2), (name, COLOURS[0], matrix.rows[-1], 0.2))
    for label, colour, values, offset in sides:
        places = [column + offset for column in range(len(values))]
        bars = axes.bar(places, [100 * (value or 0) for value in values], width=0.37, color=colour, label=label)
        texts = ["–" if value is None else f"{100 * value:.0f}" for value in values]
        axes.bar_label(bars, texts, padding=2, fontsize=size, color="#333333")
    tidy(axes)
    _name_columns(axes, matrix.tasks)
    axes.tick_params(axis="x", length=0)
    axes.set_ylim(0, 108)
    axes.set_yticks([0, 25, 50, 75, 100])
    axes.set_title("at the end, all tasks\n", fontsize=12, fontweight="bold", loc="left")
    axes.text(0, 1.03, "accuracy in %", transform=axes.transAxes, fontsize=9.5, color=MUTED)
    place: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1.0, 0.99), "ncols": 2}
    axes.legend(**place, frameon=False, fontsize=8.5, handlelength=1.0, columnspacing=1.2)


def _name_columns(axes: Axes, names: Sequence[str], *, offset: float = 0.0) -> None:
    """Write the tasks' names below their columns. Long names and many names are slanted."""
    axes.set_xticks([column + offset for column in range(len(names))], names, fontsize=9)
    if len(names) > 6 or max(map(len, names)) > 12:
        for label in axes.get_xticklabels():
            label.set(ha="right", rotation=35, rotation_mode="anchor")
