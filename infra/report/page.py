"""A run's page: one HTML file, the same for the same values, with nothing in it that is loaded or that runs.

Example:
    >>> render_page(report, evaluation)  # doctest: +SKIP
    '<!doctype html>…'
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from deal_core.evaluation.metrics import AccuracyMatrix
from deal_core.evaluation.report import EvaluationReport
from infra.report import formatting as words
from infra.report.figures import accuracy_over_versions, fill_bars, loss_curve
from infra.report.inline_svg import inline_svg
from infra.report.run_report import RunReport

NUM_SHADES = 11
"""Of the heat map, from 0 to 100 %; `page.css` has their colours, for light and for dark screens."""


class MatrixCell(NamedTuple):
    """One cell of the accuracy matrix."""

    text: str
    shade: int | None
    """None: not measured."""
    is_trained: bool


class MatrixRow(NamedTuple):
    """One row of the accuracy matrix."""

    name: str
    trained: str
    cells: tuple[MatrixCell, ...]


def render_page(report: RunReport, evaluation: EvaluationReport) -> str:
    """The page of a run.

    Args:
        report: what `report.json` holds.
        evaluation: what `evaluation.json` holds.
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
        "charts": _charts(report, evaluation, versions),
        "timings": [(name, seconds, 100 * seconds / slowest) for name, seconds in report.seconds.items()],
        "totals": words.totals(report.changed),
    }
    return _environment().get_template("page.html.j2").render(context)


def _charts(report: RunReport, evaluation: EvaluationReport, versions: Sequence[str]) -> dict[str, str]:
    """The page's figures by name, each an SVG element."""
    tasks = accuracy_over_versions(evaluation.matrix, versions)
    loss, fill = loss_curve(report.training.losses), fill_bars(report.training.fill)
    return {
        "tasks": inline_svg(tasks, "tasks", "Accuracy of every task, version by version"),
        "loss": inline_svg(loss, "loss", "Training loss over optimiser steps"),
        "fill": inline_svg(fill, "fill", "Share of the adapter's slots in use, layer by layer"),
    }


def matrix_rows(matrix: AccuracyMatrix, versions: Sequence[str]) -> list[MatrixRow]:
    """The untouched base model's row, then one a version, each with its number in the registry."""
    rows = [MatrixRow("base", "", tuple(_cell(value, False) for value in matrix.base))]
    for version, trained, values in zip(versions, matrix.trained, matrix.rows, strict=True):
        cells = (_cell(value, task == trained) for task, value in zip(matrix.tasks, values, strict=True))
        rows.append(MatrixRow(version, trained, tuple(cells)))
    return rows


def _cell(share: float | None, is_trained: bool) -> MatrixCell:
    shade = None if share is None else round(share * (NUM_SHADES - 1))
    return MatrixCell(words.percent(share), shade, is_trained)


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("infra.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {
        "percent": words.percent, "points": words.points, "duration": words.duration, "count": words.count,
    }  # fmt: skip
    return environment
