"""What happened in training, as pictures."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from infra.report.style import COLOURS, MUTED, new_figure, say_empty, tidy


def loss_curve(losses: Sequence[tuple[int, float]]) -> Figure:
    """The training loss over optimiser steps, with its running mean where there are many points.

    Args:
        losses: pairs of step and loss, in order.
    """
    figure = new_figure(7.5, 3.6)
    axes = figure.subplots()
    points = [(step, loss) for step, loss in losses if math.isfinite(loss)]
    if not points:
        say_empty(axes, "no loss was logged")
        return figure
    steps, values = (numpy.array(column) for column in zip(*points, strict=True))
    many = len(points) >= 60
    axes.plot(steps, values, color=COLOURS[0], linewidth=1.2, alpha=0.35 if many else 1.0,
              marker="" if many else "o", markersize=3.5)  # fmt: skip
    if many:
        half = len(points) // 30
        smooth = numpy.convolve(values, numpy.ones(2 * half + 1) / (2 * half + 1), "valid")
        axes.plot(steps[half : len(steps) - half], smooth, color=COLOURS[0], linewidth=2.2)
        axes.text(1, 1.02, f"line: running mean of {2 * half + 1} points", transform=axes.transAxes, ha="right",
                  fontsize=8, color=MUTED)  # fmt: skip
    tidy(axes)
    axes.set_ylim(0, float(values.max()) * 1.06 or 1)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("optimiser step", color=MUTED)
    axes.set_ylabel("loss", color=MUTED)
    axes.set_title("Training loss", fontsize=11, loc="left")
    return figure


def fill_bars(fill: Mapping[str, float]) -> Figure:
    """How full the adapter is: one row of bars a projection, one bar a layer.

    Args:
        fill: module name (`model.layers.3.self_attn.q_proj`) to the share of its slots in use, 0 to 1.
    """
    groups = by_projection(fill)
    figure = new_figure(7.5, 1.0 + 1.25 * max(len(groups), 1))
    panels = figure.subplots(max(len(groups), 1), 1, sharex=True, squeeze=False)[:, 0]
    if not groups:
        say_empty(panels[0], "this strategy keeps no slots")
        return figure
    for panel, (name, shares) in zip(panels, groups.items(), strict=True):
        heights = [100 * share for share in shares.values()]
        panel.bar(list(shares), [100] * len(heights), color="#EFEFEF", width=0.82)
        panel.bar(list(shares), heights, color=COLOURS[0], width=0.82)
        mean = sum(heights) / len(heights)
        panel.axhline(mean, color=COLOURS[1], linewidth=1.4)
        panel.text(1.008, mean / 100, f"mean\n{mean:.0f} %", transform=panel.transAxes, va="center", fontsize=8,
                   color=COLOURS[1])  # fmt: skip
        tidy(panel)
        panel.set_ylim(0, 100)
        panel.set_yticks([0, 50, 100])
        panel.set_ylabel(name, color="#333333", fontsize=9)
    layers = {layer for shares in groups.values() for layer in shares}
    panels[-1].set_xlim(min(layers) - 0.7, max(layers) + 0.7)
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=15))
    panels[-1].set_xlabel("layer", color=MUTED)
    panels[0].set_title("Slots of the adapter in use, %", fontsize=11, loc="left")
    return figure


def by_projection(fill: Mapping[str, float]) -> dict[str, dict[int, float]]:
    """Projection to layer to share; the first number in a module's name is its layer."""
    found: defaultdict[tuple[str, ...], dict[int, float]] = defaultdict(dict)
    for module, share in fill.items():
        parts = module.split(".")
        layer = next((int(part) for part in parts if part.isdigit()), 0)
        found[tuple(part for part in parts if not part.isdigit())][layer] = share
    common = set.intersection(*(set(path) for path in found)) if len(found) > 1 else set()
    return {
        ("\n".join(part for part in path if part not in common) if common else path[-1]): dict(sorted(shares.items()))
        for path, shares in found.items()
    }
