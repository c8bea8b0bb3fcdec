"""The charts of a run's page, as SVG elements, and the picture of live traffic. Only charts need matplotlib."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from deal_core.evaluation.report import EvaluationReport
from deal_core.monitoring.report import LiveLook, TaskDrift
from infra.report.figures import (
    COLOURS,
    MUTED,
    accuracy_over_versions,
    fill_bars,
    loss_curve,
    new_figure,
    say_empty,
    tidy,
)
from infra.report.run_report import RunReport

PAGE_COLOURS = {
    COLOURS[0]: "var(--accent)",
    COLOURS[1]: "var(--second)",
    COLOURS[-1]: "var(--text)",
    "#333333": "var(--text)",
    MUTED: "var(--muted)",
    "#DDDDDD": "var(--line)",
    "#EFEFEF": "var(--line)",
}
"""The page's variable for each colour of a figure; `page.css` has two values for each, for light and dark screens."""
_COLOUR = re.compile("|".join(PAGE_COLOURS), re.IGNORECASE)
SIDES = (("reference", "#BBBBBB"), ("live", COLOURS[0]))
MAX_LABELS = 12
"""Labels that a picture shows: those that moved most. The others are summed up."""
MAX_CHARS = 24
"""Characters of a label's name."""
BAR_HEIGHT = 0.38
"""Height of a bar, where two of them share a label's line."""
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def charts_of(
    report: RunReport, evaluation: EvaluationReport, versions: Sequence[str], live: LiveLook | None
) -> dict[str, str]:
    """Return the charts of a page: `tasks`, `loss`, `fill`, and `live:TASK` for each task with live traffic."""
    tasks = accuracy_over_versions(evaluation.matrix, versions)
    drawn = {
        "tasks": inline_svg(tasks, "tasks", "Accuracy of every task, version by version"),
        "loss": inline_svg(loss_curve(report.training.losses), "loss", "Training loss over optimiser steps"),
        "fill": inline_svg(
            fill_bars(report.training.fill), "fill", "Share of the adapter's slots in use, layer by layer"
        ),
    }
    for number, each in enumerate(() if live is None else live.drift.tasks):
        if each.status == "compared":
            title = f"Live traffic of {each.task} and its reference"
            drawn[f"live:{each.task}"] = inline_svg(live_traffic(each), f"live{number}", title)
    return drawn


def inline_svg(figure: Figure, name: str, title: str) -> str:
    """Draw a figure as an SVG element. The same figure gives the same text.

    The element loads nothing and has the page's light or dark colours. Its text can be searched and copied. No other
    figure of the page may have its `name`, because the element's ids depend on the name. Screen readers read `title`.
    """
    drawn = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.sans-serif": ["DejaVu Sans"]}):
        figure.savefig(drawn, format="svg", transparent=True, metadata=_NO_METADATA)
    text = drawn.getvalue()
    (box,) = re.findall(r'viewBox="([^"]*)"', text)
    content = text[text.index(">", text.index("<svg")) + 1 :]  # HTML needs no namespaces
    content = re.sub(r"<!--.*?-->|<style.*?</style>", "", content, flags=re.DOTALL)  # a style would affect the page
    content = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]).replace("\n", ""), content)
    content = re.sub(r'<g id="[^"]*">', "<g>", content).replace("xlink:href", "href")
    content = _COLOUR.sub(lambda found: PAGE_COLOURS[found[0].upper()], content)
    content = re.sub(r"\s*\n\s*", "\n", content).strip()
    label = html.escape(title)
    return f'<svg viewBox="{box}" role="img" aria-label="{label}">\n<title>{label}</title>\n{content}'


def live_traffic(task: TaskDrift) -> Figure:
    """Draw the label shares and the confidences of a task: reference against live rows."""
    shares = shown_labels(task.label_shares)
    figure = new_figure(7.5, max(2.6, 1.3 + 0.36 * len(shares)))
    if not shares:
        _draw_confidences(figure.subplots(), task.confidences)
        return figure
    labels, confidences = figure.subplots(1, 2, width_ratios=[1.25, 1.0])
    _draw_shares(labels, shares)
    _draw_confidences(confidences, task.confidences)
    return figure


def shown_labels(shares: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Return the labels that a picture shows, with names of bounded length; the last one sums up the others.

    Example:
        >>> shown_labels({"loan": (0.5, 0.75), "": (0.5, 0.25)})
        {'loan': (0.5, 0.75), 'no label': (0.5, 0.25)}
    """
    order = sorted(shares, key=lambda label: -abs(shares[label][1] - shares[label][0]))
    kept = set(order if len(order) <= MAX_LABELS else order[: MAX_LABELS - 1])
    found: dict[str, tuple[float, float]] = {}
    for label in shares:
        if label in kept:
            name = label or "no label"
            name = name if len(name) <= MAX_CHARS else name[: MAX_CHARS - 1] + "…"
            found[f"{name} ({len(found)})" if name in found else name] = shares[label]
    others = [shares[label] for label in shares if label not in kept]
    if others:
        found[f"{len(others)} others"] = (sum(each[0] for each in others), sum(each[1] for each in others))
    return found


def _draw_shares(axes: Axes, shares: Mapping[str, tuple[float, float]]) -> None:
    places = range(len(shares))
    for side, (name, colour) in enumerate(SIDES):
        heights = [100 * each[side] for each in shares.values()]
        lines = [place + (side - 0.5) * BAR_HEIGHT for place in places]
        axes.barh(lines, heights, height=BAR_HEIGHT * 0.94, color=colour, label=name)
    tidy(axes)
    axes.grid(axis="y", visible=False)
    axes.set_yticks([*places], [name.replace("$", r"\$") for name in shares], fontsize=8.5)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("share of the answers, %", color=MUTED)
    axes.set_title("Answers", fontsize=11, loc="left")
    axes.legend(frameon=False, fontsize=8.5, loc="lower right", bbox_to_anchor=(1.0, 0.99), ncols=2)


def _draw_confidences(axes: Axes, bins: Sequence[tuple[float, float]]) -> None:
    axes.set_title("Confidence", fontsize=11, loc="left")
    if not bins:
        say_empty(axes, "no confidence is known")
        return
    edges = [number / len(bins) for number in range(len(bins) + 1)]
    for side, (name, colour) in enumerate(SIDES):
        axes.stairs([100 * each[side] for each in bins], edges, fill=side == 0, color=colour, linewidth=1.8, label=name)
    tidy(axes)
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("share of the rows, %", color=MUTED)
    axes.set_xlabel("confidence of the answer", color=MUTED)
