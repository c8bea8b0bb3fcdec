"""Figures of the benchmark: what is left of every task, and how full the adapter is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from infra.report.figures import COLOURS, MARKERS, MUTED, new_figure, tidy

Points = Mapping[str, tuple[float, float]]


def kept_figure(tasks: Sequence[str], learned_and_kept: Mapping[str, Points]) -> Figure:
    """One row per task: its accuracy right after it was learned (hollow) and in the end (filled), per strategy.

    Args:
        tasks: in the order in which they arrived.
        learned_and_kept: strategy to task to both accuracies, 0 to 100; a task may be missing.
    """
    figure = new_figure(8.0, 1.2 + 0.42 * max(len(tasks), 1))
    axes = figure.subplots()
    offsets = [0.24 * (number - (len(learned_and_kept) - 1) / 2) for number in range(len(learned_and_kept))]
    for offset, colour, (_, points) in zip(offsets, COLOURS, learned_and_kept.items(), strict=False):
        for row, task in enumerate(tasks):
            if task not in points:
                continue
            learned, kept = points[task]
            axes.plot([learned, kept], [row + offset] * 2, color=colour, linewidth=1.6, alpha=0.55, zorder=1)
            axes.plot(learned, row + offset, "o", color=colour, markerfacecolor="white", markersize=5, zorder=2)
            axes.plot(kept, row + offset, "o", color=colour, markersize=5.5, zorder=3)
    tidy(axes)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.8)
    axes.set_yticks(range(len(tasks)), tasks)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("accuracy, %: hollow right after the task was learned, filled in the end", color=MUTED)
    handles = [Line2D([], [], color=colour, marker="o", linewidth=1.6, label=name)
               for colour, name in zip(COLOURS, learned_and_kept, strict=False)]  # fmt: skip
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), frameon=False, fontsize=9)
    return figure


def fill_figure(curves: Mapping[str, Sequence[float]]) -> Figure:
    """The share of the adapter's slots in use over the number of tasks learned, one line per strategy.

    Args:
        curves: strategy to one value per task learned, 0 to 100.
    """
    figure = new_figure(7.0, 3.6)
    axes = figure.subplots()
    for colour, marker, (name, values) in zip(COLOURS, MARKERS, curves.items(), strict=False):
        axes.plot(range(1, len(values) + 1), values, color=colour, marker=marker, markersize=5, linewidth=2, label=name)
    tidy(axes)
    axes.set_ylim(0, 100)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("tasks learned", color=MUTED)
    axes.set_ylabel("share of slots, %", color=MUTED)
    axes.set_title("Slots of the adapter that hold 95 % of its update", fontsize=11, loc="left")
    axes.legend(frameon=False, fontsize=9)
    return figure
