"""What a run's page says in words: the same in HTML and in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from deal_core.evaluation.report import EvaluationReport
from infra.report.run_report import Changed, RunReport


def verdict_of(report: RunReport) -> str:
    """What became of the version, in one sentence."""
    version = f"Version {report.version} of {report.lineage}"
    if report.verdict == "promoted":
        return f"{version} has learned {report.task}, passed the gate and was promoted."
    if report.verdict == "awaiting-approval":
        return f"{version} has learned {report.task}, passed the gate and waits for a person's approval."
    stays = f"version {report.parent_version} stays champion" if report.parent_version else "there is no champion yet"
    return f"{version}, trained on {report.task}, was rejected by the gate; {stays}."


def versions_of(report: RunReport, evaluation: EvaluationReport) -> list[str]:
    """The numbers of the versions that the matrix has rows of: this one's ancestors, oldest first, and itself.

    What the gate rejected, and what a rollback left, are versions of the lineage without a row.
    """
    known = {link.version: link.parent_version for link in report.lineage_so_far}
    chain: list[str] = []
    version: str | None = report.version
    while version is not None and version not in chain:
        chain.insert(0, version)
        version = known.get(version)
    num_rows = len(evaluation.matrix.rows)
    return chain if len(chain) == num_rows else [f"row {number}" for number in range(1, num_rows + 1)]


def origin_of(report: RunReport) -> str:
    """What the version continues."""
    return f"version {report.parent_version}" if report.parent_version else "the base model"


def scores_of(report: RunReport, evaluation: EvaluationReport) -> list[tuple[str, str]]:
    """The few numbers that matter, each with its name."""
    matrix, task = evaluation.matrix, evaluation.task
    before = evaluation.parent_accuracy_new_task
    start = evaluation.base_accuracy if before is None else before
    scores = [
        (f"{task}, before → now", f"{percent(start)} → {percent(evaluation.accuracies[task])} %"),
        (f"average of {count(len(matrix.tasks), 'task')}", f"{percent(matrix.average_accuracy)} %"),
    ]
    if matrix.forgetting is not None:
        scores.append(("forgetting", f"{points(matrix.forgetting)} points"))
    if (worst := worst_change(evaluation)) is not None:
        scores.append((f"largest change of an old task: {worst[0]}", f"{points(worst[1], sign=True)} points"))
    if report.changed:
        gained, lost = totals(report.changed)
        scores.append(("test rows gained, lost", f"+{gained}, −{lost}"))
    return scores


def worst_change(evaluation: EvaluationReport) -> tuple[str, float] | None:
    """The old task that lost most against the parent, or gained least; None where there is no old task."""
    changes = {
        task: evaluation.accuracies[task] - before
        for task, before in evaluation.parent_accuracies.items()
        if task != evaluation.task
    }
    return min(changes.items(), key=lambda item: item[1]) if changes else None


def totals(changed: tuple[Changed, ...]) -> tuple[int, int]:
    """How many test rows were gained and lost, over all tasks."""
    return sum(each.num_gained for each in changed), sum(each.num_lost for each in changed)


def percent(share: float | None) -> str:
    """A share in hundredths; a dash where it is undefined."""
    return "–" if share is None else f"{100 * share:.1f}"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown."""
    return [
        "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        for cells in (header, ["---"] * len(header), *rows)
    ]


def points(share: float, *, sign: bool = False) -> str:
    """A difference of shares in points; the minus is a minus, not a hyphen, and nothing has no sign."""
    value = round(100 * share, 1) + 0.0
    return f"{value:{'+' if sign and value else ''}.1f}".replace("-", "−")


def count(number: int, noun: str) -> str:
    """A number and what it counts.

    Example:
        >>> count(2, "task")
        '2 tasks'
    """
    return f"{number} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """A wall time as people say it."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
