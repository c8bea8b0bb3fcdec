"""The charts of a run's page, as SVG elements. Only they need matplotlib."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence

from matplotlib import rc_context
from matplotlib.figure import Figure

from deal_core.evaluation.report import EvaluationReport
from deal_core.monitoring.report import LiveLook
from infra.report.figures import COLOURS, MUTED, accuracy_over_versions, fill_bars, loss_curve
from infra.report.live_figures import live_traffic
from infra.report.run_report import RunReport

PAGE_COLOURS = {
    COLOURS[0]: "var(--accent)", COLOURS[1]: "var(--second)", COLOURS[-1]: "var(--text)", "#333333": "var(--text)",
    MUTED: "var(--muted)", "#DDDDDD": "var(--line)", "#EFEFEF": "var(--line)",
}  # fmt: skip
"""The page's variable for each colour of a figure; `page.css` has two values for each, for light and dark screens."""
_COLOUR = re.compile("|".join(PAGE_COLOURS), re.IGNORECASE)
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def charts_of(
    report: RunReport, evaluation: EvaluationReport, versions: Sequence[str], live: LiveLook | None
) -> dict[str, str]:
    """Return the charts of a page: `tasks`, `loss`, `fill`, and `live:TASK` for each task with live traffic."""
    tasks = accuracy_over_versions(evaluation.matrix, versions)
    drawn = {
        "tasks": inline_svg(tasks, "tasks", "Accuracy of every task, version by version"),
        "loss": inline_svg(loss_curve(report.training.losses), "loss", "Training loss over optimiser steps"),
        "fill": inline_svg(fill_bars(report.training.fill), "fill",
                           "Share of the adapter's slots in use, layer by layer"),
    }  # fmt: skip
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
