"""A run's page: one HTML file that loads nothing and runs no script. The same values give the same file.

Example:
    >>> render_page(report, evaluation)  # doctest: +SKIP
    '<!doctype html>…'
"""

from __future__ import annotations

import functools
import html
import io
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib import rc_context
from matplotlib.figure import Figure

from deal_core.evaluation.answer_scores import scored_otherwise
from deal_core.evaluation.metrics import AccuracyMatrix
from deal_core.evaluation.report import EvaluationReport
from deal_core.monitoring.report import LiveLook
from infra.report import formatting as words
from infra.report.figures import COLOURS, MUTED, accuracy_over_versions, fill_bars, loss_curve
from infra.report.live_figures import live_traffic
from infra.report.run_report import RunReport

NUM_SHADES = 11
"""Shades of the heat map from 0 to 100 %; `page.css` has their colours, for light and for dark screens."""
PAGE_COLOURS = {
    COLOURS[0]: "var(--accent)", COLOURS[1]: "var(--second)", COLOURS[-1]: "var(--text)", "#333333": "var(--text)",
    MUTED: "var(--muted)", "#DDDDDD": "var(--line)", "#EFEFEF": "var(--line)",
}  # fmt: skip
"""The page's variable for each colour of a figure; `page.css` has two values for each, for light and dark screens."""
_COLOUR = re.compile("|".join(PAGE_COLOURS), re.IGNORECASE)
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


class MatrixCell(NamedTuple):
    """A cell of the accuracy matrix."""

    text: str
    shade: int | None
    """None: not measured."""
    is_trained: bool


class MatrixRow(NamedTuple):
    """A row of the accuracy matrix."""

    name: str
    trained: str
    cells: tuple[MatrixCell, ...]


def render_page(report: RunReport, evaluation: EvaluationReport, live: LiveLook | None = None) -> str:
    """Return the page of a run, from its `report.json` and its `evaluation.json`.

    `live` is the last look at the version's live traffic; without it, the page has no section about it.
    """
    versions = words.versions_of(report, evaluation)
    slowest = max(report.seconds.values(), default=0.0) or 1.0
    tasks = accuracy_over_versions(evaluation.matrix, versions)
    loss, fill = loss_curve(report.training.losses), fill_bars(report.training.fill)
    context: dict[str, Any] = {
        "report": report,
        "evaluation": evaluation,
        "verdict": words.verdict_of(report),
        "origin": words.origin_of(report),
        "scores": words.scores_of(report, evaluation),
        "matrix": matrix_rows(evaluation.matrix, versions),
        "charts": {
            "tasks": inline_svg(tasks, "tasks", "Accuracy of every task, version by version"),
            "loss": inline_svg(loss, "loss", "Training loss over optimiser steps"),
            "fill": inline_svg(fill, "fill", "Share of the adapter's slots in use, layer by layer"),
        },
        "timings": [(name, seconds, 100 * seconds / slowest) for name, seconds in report.seconds.items()],
        "totals": words.totals(report.changed),
        "otherwise": scored_otherwise(evaluation.metrics),
        "live": live,
        "live_charts": {} if live is None else _live_charts(live),
    }
    return _environment().get_template("page.html.j2").render(context)


@functools.cache
def _environment() -> Environment:
    """Return the environment of the templates; it compiles each of them once in a process."""
    environment = Environment(
        loader=PackageLoader("infra.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {
        "percent": words.percent, "points": words.points, "duration": words.duration, "count": words.count,
    }  # fmt: skip
    return environment


def _live_charts(live: LiveLook) -> dict[str, str]:
    return {
        each.task: inline_svg(live_traffic(each), f"live{number}", f"Live traffic of {each.task} and its reference")
        for number, each in enumerate(live.drift.tasks) if each.status == "compared"
    }  # fmt: skip


def matrix_rows(matrix: AccuracyMatrix, versions: Sequence[str]) -> list[MatrixRow]:
    """Return the base model's row, then a row for each version with its number in the registry."""
    rows = [MatrixRow("base", "", tuple(_cell(value, False) for value in matrix.base))]
    for version, trained, values in zip(versions, matrix.trained, matrix.rows, strict=True):
        cells = (_cell(value, task == trained) for task, value in zip(matrix.tasks, values, strict=True))
        rows.append(MatrixRow(version, trained, tuple(cells)))
    return rows


def _cell(share: float | None, is_trained: bool) -> MatrixCell:
    shade = None if share is None else round(share * (NUM_SHADES - 1))
    return MatrixCell(words.percent(share), shade, is_trained)


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
