"""The paper that figures are drawn on: no global state, colours that everybody can tell apart."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#444444")
"""Okabe and Ito's palette, without the yellow that vanishes on white."""
MARKERS = "osD^vPX*"
MUTED = "#666666"


def new_figure(width: float, height: float) -> Figure:
    """An empty white figure; sizes in inches. It lays out its axes itself."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save_png(figure: Figure, path: Path) -> None:
    """Write the figure as a PNG of 150 dots per inch."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=150)


def tidy(axes: Axes) -> None:
    """Leave away the frame, and draw a light grid behind the values."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(MUTED)
    axes.tick_params(colors="#333333", labelsize=9)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)


def say_empty(axes: Axes, text: str) -> None:
    """Say why there is nothing to see, instead of showing empty axes."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, ha="center", va="center", color=MUTED, transform=axes.transAxes)


def spread(positions: Sequence[float], gap: float) -> list[float]:
    """Move positions apart to at least `gap`, keeping their order: for labels beside the ends of lines."""
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    moved = list(positions)
    for before, here in pairwise(order):
        moved[here] = max(moved[here], moved[before] + gap)
    excess = (max(moved) - max(positions)) / 2 if moved else 0.0
    return [position - excess for position in moved]
