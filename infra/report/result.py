"""One picture of what a sequence of tasks came to: the README's."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from deal_core.evaluation.metrics import AccuracyMatrix
from infra.report.matrix import describe, draw_heatmap, name_columns
from infra.report.style import COLOURS, MUTED, new_figure, tidy


def result_figure(
    matrix: AccuracyMatrix, rival: AccuracyMatrix | None = None, *, name: str = "deal", rival_name: str = "seq_lora"
) -> Figure:
    """The accuracy matrix beside its rival's, and what is left of each task at the end.

    Args:
        matrix: at least one version.
        rival: the same tasks in the same order, learned another way.
        name: what to call the first.
        rival_name: what to call the second.
    """
    matrices = {name: matrix} if rival is None else {name: matrix, rival_name: rival}
    panel = max(3.6, 0.62 * len(matrix.tasks))
    figure = new_figure(1.4 + panel * (len(matrices) + 1.1), 2.6 + 0.4 * len(matrix.rows))
    *maps, bars = figure.subplots(1, len(matrices) + 1, width_ratios=[1.0] * len(matrices) + [1.1])
    for axes, (title, shown) in zip(maps, matrices.items(), strict=True):
        draw_heatmap(axes, shown)
        axes.set_title(f"{title}\n", fontsize=12, fontweight="bold", loc="left")
        axes.text(0, 1.03, describe(shown), transform=axes.transAxes, fontsize=9.5, color=MUTED)
    for axes in maps[1:]:
        axes.set_yticks([])
    _draw_bars(bars, matrices)
    return figure


def _draw_bars(axes: Axes, matrices: dict[str, AccuracyMatrix]) -> None:
    """Accuracy of every task after the last one was learned, beside the base model's."""
    first = next(iter(matrices.values()))
    series = {"base model": first.base, **{name: matrix.rows[-1] for name, matrix in matrices.items()}}
    colours = ("#BBBBBB", COLOURS[0], COLOURS[5])
    width = 0.8 / len(series)
    for index, (name, values) in enumerate(series.items()):
        offset = (index - (len(series) - 1) / 2) * width
        places = [column + offset for column in range(len(values))]
        heights = [100 * (value or 0) for value in values]
        axes.bar(places, heights, width=width * 0.92, color=colours[index], label=name)
        for place, height, value in zip(places, heights, values, strict=True):
            text = "–" if value is None else f"{height:.0f}"
            size = 8 if len(values) <= 4 else 6
            axes.text(place, height + 1.5, text, ha="center", fontsize=size, color="#333333")
    tidy(axes)
    name_columns(axes, first.tasks)
    axes.tick_params(axis="x", length=0)
    axes.set_ylim(0, 108)
    axes.set_yticks([0, 25, 50, 75, 100])
    axes.set_title("at the end, all tasks\n", fontsize=12, fontweight="bold", loc="left")
    axes.text(0, 1.03, "accuracy in %", transform=axes.transAxes, fontsize=9.5, color=MUTED)
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 0.99), ncols=len(series), frameon=False, fontsize=8.5,
                handlelength=1.0, columnspacing=1.2)  # fmt: skip
