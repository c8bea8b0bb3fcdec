"""The tables and lines in which commands show their results to people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from flows.demo import DemoResult
    from flows.evaluate import EvaluateResult
    from flows.history import HistoryEntry
    from flows.results import AdaptResult
    from flows.validate import ValidateResult
    from flows.watch import WatchResult


def percent(share: float | None) -> str:
    """A share as points of a hundred; a dash where it is undefined."""
    return "–" if share is None else f"{100 * share:.1f}"


def matrix_table(matrix: Mapping[str, Any], title: str) -> Table:
    """The accuracy matrix (its JSON): one row per version, one column per task, the untouched base model first."""
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("after learning")
    for task in matrix["tasks"]:
        table.add_column(task, justify="right")
    table.add_row("(base model)", *(percent(value) for value in matrix["base"]), style="dim")
    for trained, row in zip(matrix["trained"], matrix["rows"], strict=True):
        cells = [f"[bold]{percent(value)}[/]" if task == trained else percent(value)
                 for task, value in zip(matrix["tasks"], row, strict=True)]  # fmt: skip
        table.add_row(trained, *cells)
    return table


def show_adaptation(run: AdaptResult) -> Sequence[RenderableType]:
    """The end of one adaptation."""
    color = {"promoted": "green", "rejected": "red", "repeat": "yellow"}[run.status]
    shown: list[RenderableType] = []
    if run.matrix is not None and run.scores is not None:
        shown += [matrix_table(run.matrix, f"Accuracy of {run.lineage}, %"), _scores(run)]
    shown.append(f"[bold {color}]{escape(run.message)}[/]")
    shown += [f"  • {escape(reason)}" for reason in run.reasons]
    return shown


def show_watch(result: WatchResult) -> Sequence[RenderableType]:
    """What a watch has handled."""
    if not result.files:
        return ["Nothing new in the inbox."]
    table = Table(title=f"Handled for {result.lineage}", title_justify="left", title_style="bold")
    for column in ("file", "outcome", "version", "what happened"):
        table.add_column(column, overflow="fold")
    for seen in result.files:
        table.add_row(seen.key, seen.outcome, seen.version or "–", escape(seen.message))
    return [table]


def show_evaluation(result: EvaluateResult) -> Sequence[RenderableType]:
    """Fresh accuracies beside the recorded ones."""
    table = Table(title=f"Version {result.version} of {result.lineage}, accuracy in %", title_justify="left")
    table.add_column("task")
    for column in ("now", "at its run", "test rows"):
        table.add_column(column, justify="right")
    for task, value in result.accuracies.items():
        table.add_row(task, percent(value), percent(result.recorded.get(task)), str(result.num_rows[task]))
    return [table]


def show_history(lineage: str, entries: Sequence[HistoryEntry]) -> Sequence[RenderableType]:
    """The versions of a lineage."""
    table = Table(title=f"Lineage {lineage}", title_justify="left", title_style="bold", box=box.SIMPLE, pad_edge=False)
    for column in ("version", "parent", "AA", "forgetting"):
        table.add_column(column, justify="right")
    for column in ("task", "strategy", "gate", "alias", "when"):
        table.add_column(column, no_wrap=column != "alias")
    for entry in entries:
        gate = "[green]accepted[/]" if entry.accepted else "[red]rejected[/]"
        table.add_row(
            entry.version, entry.parent_version or "base", percent(entry.average_accuracy), percent(entry.forgetting),
            entry.task, entry.strategy, gate, " ".join(entry.aliases), f"{entry.created.astimezone():%m-%d %H:%M}",
        )  # fmt: skip
    reasons = [f"Version {entry.version}: {escape(reason)}" for entry in entries for reason in entry.reasons]
    return [table, *reasons]


def show_validation(result: ValidateResult) -> Sequence[RenderableType]:
    """What the checks say of a file."""
    verdict = "[green]can be adapted[/]" if result.accepted else "[red]is refused[/]"
    shown: list[RenderableType] = [
        f"{escape(result.file)} {verdict}: {result.num_read} rows read, {result.num_train} training, "
        f"{result.num_test} test, {result.num_rejected} bad",
        f"format {result.format}" + (f", labels {escape(', '.join(result.labels))}" if result.labels else ""),
    ]
    if result.bad_rows:
        table = Table(title=f"Bad rows (the first {len(result.bad_rows)})", title_justify="left")
        table.add_column("row", justify="right")
        table.add_column("line", justify="right")
        table.add_column("reason", overflow="fold")
        for bad in result.bad_rows:
            table.add_row(str(bad.row), "–" if bad.line is None else str(bad.line), escape("\n".join(bad.reasons)))
        shown.append(table)
    if result.refusal:
        shown.append(f"[red]{escape(result.refusal)}[/]")
    return shown


def show_demo(result: DemoResult, home: Path) -> Sequence[RenderableType]:
    """What the demo came to, lineages side by side."""
    shown: list[RenderableType] = []
    comparison = Table(title="In the end", title_justify="left", title_style="bold")
    comparison.add_column("lineage")
    comparison.add_column("strategy")
    for column in ("AA", "forgetting", "BWT", "FWT", "champion"):
        comparison.add_column(column, justify="right")
    for outcome in result.outcomes:
        if outcome.matrix is None or outcome.scores is None:
            continue
        shown.append(matrix_table(outcome.matrix, f"Accuracy of {outcome.lineage} ({outcome.strategy}), %"))
        scores = outcome.scores
        comparison.add_row(
            outcome.lineage, outcome.strategy, percent(scores.average_accuracy), percent(scores.forgetting),
            percent(scores.backward_transfer), percent(scores.forward_transfer), f"version {outcome.champion}",
        )  # fmt: skip
    if shown:
        shown.append(comparison)
    for outcome in result.outcomes:
        for run in outcome.runs:
            if run.rejected:
                shown += [f"[red]{escape(run.message)}[/]", *(f"  • {escape(reason)}" for reason in run.reasons)]
        shown += [f"[red]{escape(message)}[/]" for message in outcome.refused]
    option = f" --home {home}"
    first = result.outcomes[0].lineage
    shown.append(
        f"Look closer:  deal history --lineage {first}{option}\n"
        f"              deal ui{option}\n"
        f"              deal predict --lineage {first} --task parcels \"My parcel is stuck at customs\"{option}"
    )  # fmt: skip
    return shown


def _scores(run: AdaptResult) -> str:
    assert run.scores is not None
    scores = run.scores
    return "   ".join(
        f"{name} [bold]{percent(value)}[/]"
        for name, value in (
            ("AA", scores.average_accuracy),
            ("forgetting", scores.forgetting),
            ("BWT", scores.backward_transfer),
            ("FWT", scores.forward_transfer),
        )
    )
