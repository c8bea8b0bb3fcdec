"""What several commands need to show their results to people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from deal_core.evaluation.answer_scores import scored_otherwise

if TYPE_CHECKING:
    from flows.adapt import AdaptResult, Scores
    from tasks.inbox import HeldArrival


def heading(text: str) -> str:
    """A line above a table."""
    return f"\n[bold]{escape(text)}[/]"


def percent(share: float | None) -> str:
    """A share in percent; a dash if undefined."""
    return "–" if share is None else f"{100 * share:.1f}"


def points(value: float | None) -> str:
    """Percentage points; a dash if undefined."""
    return "–" if value is None else f"{value:.1f}"


def interval(values: Sequence[float] | None) -> str:
    """A difference with its interval; empty if it was not computed."""
    return "" if values is None else f"{values[0]:+.1f} ({values[1]:+.1f} to {values[2]:+.1f})"


def new_table(*columns: str, right: Sequence[str] = ()) -> Table:
    """An empty table; the columns named in `right` hold numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def show_held(lineage: str, held: Sequence[HeldArrival]) -> Sequence[RenderableType]:
    """Arrivals whose run was cancelled, and how each goes on."""
    return [
        f"  [yellow]•[/] {escape(f'{each.key} is held: {each.why} Let it go on with: {each.remedy(lineage)}')}"
        for each in held
    ]  # fmt: skip


def matrix_table(matrix: Mapping[str, Any]) -> Table:
    """The accuracy matrix (its JSON): one row per version, one column per task, the untouched base model first."""
    table = new_table("after learning", *matrix["tasks"], right=matrix["tasks"])
    table.add_row("(base model)", *(percent(value) for value in matrix["base"]), style="dim")
    for trained, row in zip(matrix["trained"], matrix["rows"], strict=True):
        cells = [f"[bold]{percent(value)}[/]" if task == trained else percent(value)
                 for task, value in zip(matrix["tasks"], row, strict=True)]  # fmt: skip
        table.add_row(trained, *cells)
    return table


def show_adaptation(run: AdaptResult) -> Sequence[RenderableType]:
    """The end of one adaptation."""
    color = {"promoted": "green", "rejected": "red"}.get(run.status, "yellow")
    shown: list[RenderableType] = []
    if run.matrix is not None and run.scores is not None:
        shown += [heading(f"Accuracy of {run.lineage}, %"), matrix_table(run.matrix), _scores(run.scores)]
        if told := scored_otherwise(run.metrics):
            shown.append(escape(told))
    shown.append(f"[bold {color}]{escape(run.message)}[/]")
    shown += [f"  • {escape(reason)}" for reason in run.reasons]
    return shown


def _scores(scores: Scores) -> str:
    return "   ".join(
        f"{name} [bold]{percent(value)}[/]"
        for name, value in (
            ("AA", scores.average_accuracy),
            ("forgetting", scores.forgetting),
            ("BWT", scores.backward_transfer),
            ("FWT", scores.forward_transfer),
        )
    )
