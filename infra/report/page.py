"""A run's page: its sentences and numbers, and one HTML file that loads nothing and runs no script."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from deal_core.evaluation.accuracy_matrix import AccuracyMatrix
from deal_core.evaluation.interval import score_text, sureness_text
from deal_core.evaluation.metrics import scored_otherwise
from deal_core.evaluation.report import Debt, EvaluationReport, mean_score
from deal_core.monitoring.report import LiveLook
from deal_core.safe_text import listed
from infra.branches import KnownBranch
from infra.report.run_report import Changed, RunReport
from infra.versions import Version, descent

NUM_SHADES = 11
"""Shades of the heat map from 0 to 100 %; `page.css` has their colours, for light and for dark screens."""


class MatrixCell(NamedTuple):
    """A cell of the accuracy matrix."""

    text: str
    sureness: str
    """Its interval and its number of test rows; empty if there are many."""
    shade: int | None
    """None: not measured."""
    is_trained: bool


class MatrixRow(NamedTuple):
    """A row of the accuracy matrix."""

    name: str
    trained: str
    cells: tuple[MatrixCell, ...]


def render_page(
    versions: Sequence[Version],
    report: RunReport,
    evaluation: EvaluationReport,
    live: LiveLook | None = None,
    remade: KnownBranch | None = None,
) -> str:
    """Return the page of a version's run, with what became of the version since.

    Where matplotlib is not installed, as on a worker, the page says so in place of its charts.

    Args:
        versions: Those of the lineage up to the version, which is the last one.
        report: Its `report.json`.
        evaluation: Its `evaluation.json`.
        live: The last look at its live traffic; without it, the page has no section about it.
        remade: The branch whose last version it is, if the branch was judged against the champion.
    """
    version = versions[-1]
    row_names = row_names_of(versions, evaluation)
    try:
        from infra.report.charts import charts_of

        charts = charts_of(report, evaluation, row_names, live)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        charts = None
    landed, learned = count(report.quality.num_train, "row"), report.training.num_rows
    slowest = max(report.seconds.values(), default=0.0) or 1.0
    context: dict[str, Any] = {
        "version": version,
        "versions": versions,
        "report": report,
        "evaluation": evaluation,
        "verdict": verdict_of(version),
        "learned_rows": landed if learned == report.quality.num_train else f"{learned} of {landed}",  # see `selection`
        "scores": scores_of(version, report, evaluation),
        "debts": [debt_text(task, debt) for task, debt in evaluation.debts.items()],
        "matrix": matrix_rows(evaluation.matrix, row_names),
        "charts": charts,
        "suites": suite_rows(evaluation),
        "timings": [(name, seconds, 100 * seconds / slowest) for name, seconds in report.seconds.items()],
        "totals": totals(report.changed),
        "otherwise": scored_otherwise(evaluation.metrics),
        "live": live,
        "compared": judgement_of(remade) if remade else (),
    }
    return _environment().get_template("page.html.j2").render(context)


@functools.cache
def _environment() -> Environment:
    """Return the environment of the templates; it compiles each of them once in a process."""
    environment = Environment(
        loader=PackageLoader("infra.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"percent": percent, "points": points, "duration": duration, "count": count}
    return environment


def matrix_rows(matrix: AccuracyMatrix, versions: Sequence[str]) -> list[MatrixRow]:
    """Return the base model's row, then a row for each version with its number in the lineage."""
    rows = []
    names, learned_by = ("base", *versions), ("", *matrix.learned)
    for name, learned, row in zip(names, learned_by, matrix.cells, strict=True):
        cells = tuple(
            MatrixCell(
                percent(cell.share),
                sureness_text(*cell),
                None if cell.share is None else round(cell.share * (NUM_SHADES - 1)),
                task == learned,
            )
            for task, cell in zip(matrix.tasks, row, strict=True)
        )
        rows.append(MatrixRow(name, learned, cells))
    return rows


class SuiteRow(NamedTuple):
    """A suite of general ability. Shares are 0 to 1."""

    name: str
    num_rows: int
    base: float
    parent: float | None
    """None: there is no parent."""
    now: float
    num_gained: int
    """Rows with a higher score than the base model's."""
    lost: tuple[int, ...]
    """Numbers of the rows with a lower score than the base model's, from 1."""


def suite_rows(evaluation: EvaluationReport) -> list[SuiteRow]:
    """Return a row for each suite that is on."""
    rows = []
    for name, scores in evaluation.general.items():
        pairs = list(zip(scores.base, scores.now, strict=True))
        rows.append(
            SuiteRow(
                name=name,
                num_rows=len(pairs),
                base=mean_score(scores.base),
                parent=None if scores.parent is None else mean_score(scores.parent),
                now=mean_score(scores.now),
                num_gained=sum(now > base for base, now in pairs),
                lost=tuple(number for number, (base, now) in enumerate(pairs, 1) if now < base),
            )
        )
    return rows


def verdict_of(version: Version) -> str:
    """Return what became of a version as a sentence."""
    name = f"Version {version.version} of {version.lineage}"
    if version.is_rejected:
        stays = f"{version.parent} stays champion" if version.parent_version else "there is no champion yet"
        if version.branch is not None:
            stays = f"branch {version.branch} stays at {version.parent}"
        return f"{name}, trained on {version.learned}, was {version.standing}; {stays}."
    became = {
        "promoted": "was promoted",
        "awaiting approval": "waits for a person's approval",
        "rollout": "is tried on live traffic",
        "remade": f"was put on branch {version.branch}, whose newest version becomes champion in one swap",
    }
    return f"{name} has learned {version.learned}, passed the gate and {became[version.outcome]}."


def judgement_of(remade: KnownBranch) -> tuple[str, ...]:
    """Return how the last version of a branch compares with the champion that it replaces, in sentences."""
    branch, judgement = remade.branch, remade.judgement
    if judgement is None:
        return ()
    compared = [
        f"{task} {score_text(before, num_rows)} → {score_text(judgement.accuracies[task], num_rows)} %"
        for task, before in judgement.before.items()
        for num_rows in [judgement.num_rows.get(task)]
    ]
    against = f"Against version {branch.champion}, which branch {branch.number} replaces"
    said = [f"{against}: {'; '.join(compared) or 'not compared'}."]
    if judgement.unjudged:
        said.append(f"No test row judges both versions on {listed(judgement.unjudged)}.")
    if judgement.accepted:
        said.append(f"It was accepted by {judgement.accepted.who}: {judgement.accepted.why}")
    elif judgement.reasons:
        ended = "" if remade.end else " It waits until a person accepts it, or gives the branch up."
        said.append(f"Nobody has accepted it.{ended}")
    return (*said[:1], *judgement.reasons, *said[1:])


def row_names_of(versions: Sequence[Version], evaluation: EvaluationReport) -> list[str]:
    """Return the versions of the matrix's rows: the last version's ancestors, oldest first, then the last version.

    Rejected versions have no row, and neither have versions that a rollback left out.
    """
    line = [version.version for version in reversed(descent(versions, versions[-1]))]
    num_rows = len(evaluation.matrix.rows)
    return line if len(line) == num_rows else [f"row {number}" for number in range(1, num_rows + 1)]


def scores_of(version: Version, report: RunReport, evaluation: EvaluationReport) -> list[tuple[str, str]]:
    """Return the main results, each with its name."""
    matrix, task = evaluation.matrix, evaluation.task
    before = evaluation.parent_accuracy_new_task
    start, now = evaluation.base_accuracy if before is None else before, evaluation.accuracies[task]
    num_tasks = len(matrix.tasks) - len(matrix.slices)
    scores = [(f"average of {count(num_tasks, 'task')}", f"{percent(matrix.average_accuracy)} %")]
    if not evaluation.is_consolidation:
        sureness = sureness_text(now, evaluation.num_rows.get(task))
        shown = f"{percent(start)} → {percent(now)} %" + (f" ({sureness})" if sureness else "")
        scores.insert(0, (f"{task}, before → now", shown))
    if version.arrival is not None:
        scores.append(("champion on the new rows, before", version.arrival.figure))
    if matrix.forgetting is not None:
        scores.append(("forgetting", f"{points(matrix.forgetting)} points"))
    if matrix.relative_forgetting is not None and len({evaluation.metric_name(name) for name in matrix.tasks}) > 1:
        scores.append(("forgetting, of what was gained", f"{percent(matrix.relative_forgetting)} %"))
    changes = {
        old: evaluation.accuracies[old] - accuracy
        for old, accuracy in evaluation.parent_accuracies.items()
        if (old != task or evaluation.is_consolidation) and old not in evaluation.slices
    }
    if changes:
        worst = min(changes, key=lambda old: changes[old])
        scores.append((f"largest change of an old task: {worst}", f"{points(changes[worst], sign=True)} points"))
    if evaluation.base_divergence is not None:
        scores.append((f"KL to the base model on {task}", f"{evaluation.base_divergence:.3f} nats a token"))
    if report.changed:
        gained, lost = totals(report.changed)
        scores.append(("test rows gained, lost", f"+{gained}, −{lost}"))
    return scores


def debt_text(task: str, debt: Debt) -> str:
    """Return what a task has lost since it was learned, in words."""
    return f"{task} {points(debt.points / 100)} points since version {debt.since}"


def totals(changed: tuple[Changed, ...]) -> tuple[int, int]:
    """Return the numbers of gained and lost test rows of all tasks."""
    return sum(each.num_gained for each in changed), sum(each.num_lost for each in changed)


def percent(share: float | None) -> str:
    """Return a share in per cent; a dash if it is undefined."""
    return "–" if share is None else f"{100 * share:.1f}"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table in Markdown."""
    return [
        "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        for cells in (header, ["---"] * len(header), *rows)
    ]


def points(share: float, *, sign: bool = False) -> str:
    """Return a difference of shares in percentage points, with a minus sign, not a hyphen. Zero has no sign."""
    value = round(100 * share, 1) + 0.0
    return f"{value:{'+' if sign and value else ''}.1f}".replace("-", "−")


def count(number: int, noun: str) -> str:
    """Return a number with its noun, such as "2 tasks"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Return a wall time as text."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
