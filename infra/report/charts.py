"""The charts of a run's page, as SVG elements, and the picture of live traffic. Only charts need matplotlib."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence

from matplotlib import rc_context
from matplotlib.figure import Figure

from deal_core.evaluation.report import EvaluationReport
from deal_core.monitoring.report import LiveLook, TaskDrift
from deal_core.safe_text import shorten
from infra.report.figures import (
    COLOURS,
    MUTED,
    accuracy_over_versions,
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
}
"""The page's variable for each colour of a figure; `page.css` has two values for each, for light and dark screens."""
SIDES = (("reference", "#BBBBBB"), ("live", COLOURS[0]))
MAX_LABELS = 12
"""Labels that a picture shows: those that moved most. The others are summed up."""
MAX_CHARS = 24
"""Characters of a label's name."""
BAR_HEIGHT = 0.38
"""Height of a bar, where two of them share a label's line."""


def charts_of(
    report: RunReport, evaluation: EvaluationReport, versions: Sequence[str], live: LiveLook | None
) -> dict[str, str]:
    """Return the charts of a page: `tasks`, `loss`, and `live:TASK` for each task with live traffic."""
    tasks = accuracy_over_versions(evaluation.matrix, versions)
    training = report.training
    loss = loss_curve(training.losses, training.validation_losses, training.kept_step)
    charts = {
        "tasks": inline_svg(tasks, "tasks", "Accuracy of every task, version by version"),
        "loss": inline_svg(loss, "loss", "Training loss over optimiser steps"),
    }
    for number, task in enumerate(live.drift.tasks if live is not None else ()):
        if task.status == "compared":
            title = f"Live traffic of {task.task} and its reference"
            charts[f"live:{task.task}"] = inline_svg(live_traffic(task), f"live{number}", title)
    return charts


def inline_svg(figure: Figure, name: str, title: str) -> str:
    """Draw a figure as an SVG element. The same figure gives the same text.

    The element loads nothing and has the page's light or dark colours. Its text can be searched and copied. No other
    figure of the page may have its `name`, because the element's ids depend on the name. Screen readers read `title`.
    """
    drawn = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.sans-serif": ["DejaVu Sans"]}):
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(drawn, format="svg", transparent=True, metadata=no_metadata)
    text = drawn.getvalue()
    (box,) = re.findall(r'viewBox="([^"]*)"', text)
    content = text[text.index(">", text.index("<svg")) + 1 :]  # HTML needs no namespaces
    content = re.sub(r"<!--.*?-->|<style.*?</style>", "", content, flags=re.DOTALL)  # a style would affect the page
    content = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]).replace("\n", ""), content)
    content = re.sub(r'<g id="[^"]*">', "<g>", content).replace("xlink:href", "href")
    content = re.sub("(?i)" + "|".join(PAGE_COLOURS), lambda colour: PAGE_COLOURS[colour[0].upper()], content)
    content = re.sub(r"\s*\n\s*", "\n", content).strip()
    label = html.escape(title)
    return f'<svg viewBox="{box}" role="img" aria-label="{label}">\n<title>{label}</title>\n{content}'


def live_traffic(task: TaskDrift) -> Figure:
    """Draw the label shares and the confidences of a task: reference against live rows."""
    shares = shown_labels(task.label_shares)
    figure = new_figure(7.5, max(2.6, 1.3 + 0.36 * len(shares)))
    if shares:
        labels, confidences = figure.subplots(1, 2, width_ratios=[1.25, 1.0])
        for side, (name, colour) in enumerate(SIDES):
            heights = [100 * pair[side] for pair in shares.values()]
            lines = [place + (side - 0.5) * BAR_HEIGHT for place in range(len(shares))]
            labels.barh(lines, heights, height=BAR_HEIGHT * 0.94, color=colour, label=name)
        tidy(labels)
        labels.grid(axis="y", visible=False)
        labels.set_yticks([*range(len(shares))], [name.replace("$", r"\$") for name in shares], fontsize=8.5)
        labels.invert_yaxis()
        labels.set_xlim(left=0)
        labels.set_xlabel("share of the answers, %", color=MUTED)
        labels.set_title("Answers", fontsize=11, loc="left")
        labels.legend(frameon=False, fontsize=8.5, loc="lower right", bbox_to_anchor=(1.0, 0.99), ncols=2)
    else:
        confidences = figure.subplots()
    confidences.set_title("Confidence", fontsize=11, loc="left")
    bins = task.confidences
    if not bins:
        say_empty(confidences, "no confidence is known")
        return figure
    edges = [number / len(bins) for number in range(len(bins) + 1)]
    for side, (name, colour) in enumerate(SIDES):
        heights, is_filled = [100 * pair[side] for pair in bins], side == 0
        confidences.stairs(heights, edges, fill=is_filled, color=colour, linewidth=1.8, label=name)
    tidy(confidences)
    confidences.set_xlim(0, 1)
    confidences.set_ylim(bottom=0)
    confidences.set_ylabel("share of the rows, %", color=MUTED)
    confidences.set_xlabel("confidence of the answer", color=MUTED)
    return figure


def shown_labels(shares: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Return the labels that a picture shows, with names of bounded length; the last one sums up the others.

    Example:
        >>> shown_labels({"loan": (0.5, 0.75), "": (0.5, 0.25)})
        {'loan': (0.5, 0.75), 'no label': (0.5, 0.25)}
    """
    order = sorted(shares, key=lambda label: -abs(shares[label][1] - shares[label][0]))
    kept = set(order if len(order) <= MAX_LABELS else order[: MAX_LABELS - 1])
    shown: dict[str, tuple[float, float]] = {}
    for label in shares:
        if label in kept:
            name = shorten(label or "no label", MAX_CHARS)
            shown[f"{name} ({len(shown)})" if name in shown else name] = shares[label]
    others = [shares[label] for label in shares if label not in kept]
    if others:
        shown[f"{len(others)} others"] = (sum(pair[0] for pair in others), sum(pair[1] for pair in others))
    return shown
