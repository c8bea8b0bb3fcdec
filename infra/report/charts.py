"""Geometry of the page's charts: curves and bars in a square of 100 by 100 that the page stretches to its width.

Text is no part of a chart: the page sets it beside, at one size on every screen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from deal_core.evaluation.metrics import AccuracyMatrix
from infra.report.figures import by_projection

MAX_POINTS = 400
"""Of one curve; more than a screen can show only makes the page heavy."""
MANY_POINTS = 60
"""From so many on a running mean is drawn over the curve."""


class Bars(NamedTuple):
    """One projection's share of slots in use, layer by layer."""

    name: str
    layers: tuple[int, ...]
    bars: tuple[tuple[float, float, float], ...]
    """Left edge, width and height of each."""
    mean: float
    lowest: float
    highest: float


class Curve(NamedTuple):
    """A curve of losses."""

    path: str
    mean_path: str
    """Running mean; empty where the points are few."""
    window: int
    """Points of the running mean."""
    top: float
    """Value of the upper edge; the lower one is 0."""
    last_step: int
    first: float
    last: float


class TaskLine(NamedTuple):
    """One task's accuracy, version by version."""

    task: str
    path: str
    dots: str
    """Versions that were scored."""
    learned: str
    """Versions that were trained on the task."""
    base: float | None
    """Height of the untouched base model's accuracy, from the top."""
    best: float
    now: float


def loss_chart(losses: Sequence[tuple[int, float]]) -> Curve | None:
    """The training loss over optimiser steps; None where no finite one was logged."""
    points = [(step, loss) for step, loss in losses if math.isfinite(loss)]
    if not points:
        return None
    top, last_step = round_up(max(loss for _, loss in points)), max(points[-1][0], 1)

    def place(step: float, loss: float) -> tuple[float, float]:
        return 100 * step / last_step, 100 - 100 * max(loss, 0.0) / top

    means, window = _running_mean(points) if len(points) >= MANY_POINTS else ([], 0)
    return Curve(
        path=path_of([place(*point) for point in thin(points, MAX_POINTS)]),
        mean_path=path_of([place(*point) for point in thin(means, MAX_POINTS)]),
        window=window, top=top, last_step=last_step, first=points[0][1], last=(means or points)[-1][1],
    )  # fmt: skip


def _running_mean(points: Sequence[tuple[int, float]]) -> tuple[list[tuple[int, float]], int]:
    half = len(points) // 30
    sums = [0.0]
    for _, loss in points:
        sums.append(sums[-1] + loss)
    window = 2 * half + 1
    means = [
        (points[centre][0], (sums[centre + half + 1] - sums[centre - half]) / window)
        for centre in range(half, len(points) - half)
    ]
    return means, window


def task_lines(matrix: AccuracyMatrix) -> list[TaskLine]:
    """Every task from the first version that was scored on it to the last; versions are evenly spaced."""
    last = max(len(matrix.rows) - 1, 1)
    lines = []
    for column, task in enumerate(matrix.tasks):
        cells = [(version, row[column]) for version, row in enumerate(matrix.rows)]
        known = [(100 * version / last, 100 - 100 * value) for version, value in cells if value is not None]
        learned = [place for (version, value), place in zip(
            [cell for cell in cells if cell[1] is not None], known, strict=True) if matrix.trained[version] == task]
        base = matrix.base[column]
        first = matrix.trained.index(task)
        values = [value for _, value in cells[first:] if value is not None]
        lines.append(
            TaskLine(
                task=task, path=path_of(known), dots=dots_of(known), learned=dots_of(learned),
                base=None if base is None else 100 - 100 * base, best=max(values), now=values[-1],
            )
        )  # fmt: skip
    return lines


def fill_bars(fill: Mapping[str, float]) -> list[Bars]:
    """How full the adapter is: one chart a projection, one bar a layer."""
    charts = []
    for name, shares in by_projection(fill).items():
        width = 100 / len(shares)
        heights = [100 * share for share in shares.values()]
        places = [(number + 0.1) * width for number in range(len(heights))]
        charts.append(
            Bars(
                name=name.replace("\n", " "), layers=tuple(shares),
                bars=tuple((left, 0.8 * width, height) for left, height in zip(places, heights, strict=True)),
                mean=sum(heights) / len(heights), lowest=min(heights), highest=max(heights),
            )
        )  # fmt: skip
    return charts


def path_of(points: Sequence[tuple[float, float]]) -> str:
    """An SVG path through points; empty without any."""
    return " ".join(f"{'L' if number else 'M'}{x:.2f} {y:.2f}" for number, (x, y) in enumerate(points))


def dots_of(points: Sequence[tuple[float, float]]) -> str:
    """An SVG path of strokes without length: with round ends they are dots, however the chart is stretched."""
    return " ".join(f"M{x:.2f} {y:.2f}h0" for x, y in points)


def thin(points: Sequence[tuple[int, float]], limit: int) -> list[tuple[int, float]]:
    """At most so many of the points, evenly, the first and the last among them."""
    if len(points) <= limit:
        return list(points)
    return [points[round(number * (len(points) - 1) / (limit - 1))] for number in range(limit)]


def round_up(value: float) -> float:
    """The next of 1, 1.5, 2, 3, 4, 5, 6, 8 times a power of ten: an upper edge whose half is a plain number too.

    Example:
        >>> round_up(3.2)
        4.0
    """
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if value <= step * power * (1 + 1e-9))
