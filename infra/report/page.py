"""A run's page: one HTML file that loads nothing and runs no script. The same values give the same file.

Example:
    >>> render_page(report, evaluation)  # doctest: +SKIP
    '<!doctype html>…'
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from deal_core.evaluation.answer_scores import scored_otherwise
from deal_core.evaluation.metrics import AccuracyMatrix
from deal_core.evaluation.report import EvaluationReport
from deal_core.monitoring.report import LiveLook
from infra.report import formatting as words
from infra.report.run_report import RunReport

NUM_SHADES = 11
"""Shades of the heat map from 0 to 100 %; `page.css` has their colours, for light and for dark screens."""


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

    `live` is the last look at the version's live traffic; without it, the page has no section about it. Where
    matplotlib is not installed, as on a worker, the page says so in place of its charts.
    """
    versions = words.versions_of(report, evaluation)
    slowest = max(report.seconds.values(), default=0.0) or 1.0
    context: dict[str, Any] = {
        "report": report,
        "evaluation": evaluation,
        "verdict": words.verdict_of(report),
        "origin": words.origin_of(report),
        "scores": words.scores_of(report, evaluation),
        "matrix": matrix_rows(evaluation.matrix, versions),
        "charts": _charts(report, evaluation, versions, live),
        "timings": [(name, seconds, 100 * seconds / slowest) for name, seconds in report.seconds.items()],
        "totals": words.totals(report.changed),
        "otherwise": scored_otherwise(evaluation.metrics),
        "live": live,
    }
    return _environment().get_template("page.html.j2").render(context)


def _charts(
    report: RunReport, evaluation: EvaluationReport, versions: Sequence[str], live: LiveLook | None
) -> dict[str, str] | None:
    """The charts by name, and those of live traffic by `live:TASK`; None: matplotlib is not installed here."""
    try:
        from infra.report.charts import charts_of
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        return None
    return charts_of(report, evaluation, versions, live)


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
