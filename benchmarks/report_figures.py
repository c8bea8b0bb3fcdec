"""Figures of the benchmark: what is left of every task, and how the average develops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from infra.report.figures import COLOURS, MARKERS, MUTED, new_figure, say_empty, tidy

PANELS_A_ROW = 4
Points = Mapping[str, tuple[float, float]]


def kept_figure(tasks: Sequence[str], learned_and_kept: Mapping[str, Points]) -> Figure:
    """One row per task: its accuracy right after it was learned (hollow) and in the end (filled), per strategy.

    Args:
        tasks: in the order in which they arrived.
        learned_and_kept: strategy to task to both accuracies, 0 to 100; a task may be missing.
    """
    figure = new_figure(8.0, 1.2 + 0.42 * max(len(tasks), 1))
    axes = figure.subplots()
    if not learned_and_kept:
        say_empty(axes, "no strategy was scored right after each task")
        return figure
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


def over_time_figure(tasks: Sequence[str], curves: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """One panel per task: its accuracy from when it was learned to the end, one line per strategy.

    Args:
        tasks: in the order in which they arrived.
        curves: strategy to task to its accuracies after it was learned and after each later task, 0 to 100.
    """
    if not curves:
        figure = new_figure(7.0, 2.4)
        say_empty(figure.subplots(), "no strategy was scored on all tasks after each task")
        return figure
    num_columns = min(len(tasks), PANELS_A_ROW)
    num_rows = -(-len(tasks) // num_columns)
    figure = new_figure(0.8 + 2.4 * num_columns, 0.9 + 2.1 * num_rows)
    panels = figure.subplots(num_rows, num_columns, sharex=True, sharey=True, squeeze=False)
    for start, (axes, task) in enumerate(zip(panels.flat, tasks, strict=False), start=1):
        for colour, marker, (name, by_task) in zip(COLOURS, MARKERS, curves.items(), strict=False):
            values = by_task.get(task, ())
            axes.plot(range(start, start + len(values)), values, color=colour, marker=marker, markersize=5, linewidth=2,
                      label=name)  # fmt: skip
        tidy(axes)
        axes.set_title(task, fontsize=10, loc="left")
    for axes in panels.flat[len(tasks) :]:
        axes.set_axis_off()
    panels[0, 0].set(ylim=(0, 100), xlim=(0.7, len(tasks) + 0.3))
    panels[0, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.supxlabel("tasks learned", fontsize=10, color=MUTED)
    figure.supylabel("accuracy, %", fontsize=10, color=MUTED)
    handles = panels[0, 0].lines
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), frameon=False, fontsize=9)
    return figure


def development_figure(curves: Mapping[str, Sequence[float]], title: str, label: str) -> Figure:
    """One line per strategy over the number of tasks learned.

    Args:
        curves: strategy to one value per task learned, 0 to 100.
        title: of the figure.
        label: of the vertical axis.
    """
    figure = new_figure(7.0, 3.6)
    axes = figure.subplots()
    if not curves:
        say_empty(axes, "no strategy was scored on all tasks after each task")
        return figure
    for colour, marker, (name, values) in zip(COLOURS, MARKERS, curves.items(), strict=False):
        axes.plot(range(1, len(values) + 1), values, color=colour, marker=marker, markersize=5, linewidth=2, label=name)
    tidy(axes)
    axes.set_ylim(0, 100)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("tasks learned", color=MUTED)
    axes.set_ylabel(label, color=MUTED)
    axes.set_title(title, fontsize=11, loc="left")
    axes.legend(frameon=False, fontsize=9)
    return figure
