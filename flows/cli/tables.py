"""The tables and lines in which commands show their results to people."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from deal_core.printable import listed

if TYPE_CHECKING:
    from flows.benchmark import BenchmarkResult
    from flows.cli.demo import DemoResult
    from flows.evaluate import EvaluateResult
    from flows.results import AdaptResult, Scores
    from flows.watch import WatchResult
    from tasks.lineage.history import HistoryEntry
    from tasks.validate import ValidateResult

_APPROVAL = {"awaiting": ", awaits approval", "given": ", approved", "refused": ", [red]refused[/]"}


def percent(share: float | None) -> str:
    """A share as points of a hundred; a dash where it is undefined."""
    return "–" if share is None else f"{100 * share:.1f}"


def new_table(*columns: str, right: Sequence[str] = ()) -> Table:
    """An empty table; the columns named in `right` hold numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


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
    shown.append(f"[bold {color}]{escape(run.message)}[/]")
    shown += [f"  • {escape(reason)}" for reason in run.reasons]
    return shown


def show_watch(result: WatchResult) -> Sequence[RenderableType]:
    """What a watch has handled."""
    if not result.files:
        return ["Nothing new in the inbox."]
    table = new_table("file", "outcome", "version", "what happened", right=["version"])
    for seen in result.files:
        table.add_row(escape(seen.key), seen.outcome, seen.version or "–", escape(seen.message))
    return [heading(f"Handled for {result.lineage}"), table]


def show_evaluation(result: EvaluateResult) -> Sequence[RenderableType]:
    """Fresh accuracies beside the recorded ones."""
    numbers = ["now", "at its run", "test rows"]
    table = new_table("task", *numbers, right=numbers)
    for task, value in result.accuracies.items():
        table.add_row(task, percent(value), percent(result.recorded.get(task)), str(result.num_rows[task]))
    unjudged = [f"[yellow]{escape(why)}[/]" for why in result.unjudged.values()]
    return [heading(f"Accuracy of {result.lineage}, version {result.version}, %"), table, *unjudged]


def show_history(lineage: str, entries: Sequence[HistoryEntry]) -> Sequence[RenderableType]:
    """The versions of a lineage."""
    numbers = ["version", "parent", "AA", "forgetting"]
    table = new_table(*numbers, "task", "strategy", "gate", "alias", "when", right=numbers)
    for entry in entries:
        gate = "[green]accepted[/]" if entry.accepted else "[red]rejected[/]"
        if entry.approval is not None:
            gate += _APPROVAL[entry.approval]
        table.add_row(
            entry.version, entry.parent_version or "base", percent(entry.average_accuracy), percent(entry.forgetting),
            entry.task, entry.strategy, gate, " ".join(entry.aliases), f"{entry.created.astimezone():%m-%d %H:%M}",
        )  # fmt: skip
    reasons = [f"Version {entry.version}: {escape(reason)}" for entry in entries for reason in entry.reasons]
    earlier = int(entries[0].version) - 1
    more = [f"[dim]{earlier} earlier versions; --newest 0 shows all.[/]"] if earlier else []
    return [heading(f"Lineage {lineage}"), *more, table, *reasons]


def show_validation(result: ValidateResult) -> Sequence[RenderableType]:
    """What the checks say of a file."""
    verdict = "[green]can be adapted[/]" if result.accepted else "[red]is refused[/]"
    shown: list[RenderableType] = [
        f"{escape(result.file)} {verdict}: {result.num_read} rows read, {result.num_train} training, "
        f"{result.num_test} test, {result.num_rejected} bad",
        f"format {result.format}" + (f", labels {escape(listed(result.labels))}" if result.labels else ""),
    ]
    if result.bad_rows:
        table = new_table("row", "line", "reason", right=["row", "line"])
        for bad in result.bad_rows:
            table.add_row(str(bad.row), "–" if bad.line is None else str(bad.line), escape("\n".join(bad.reasons)))
        shown += [heading(f"Bad rows (the first {len(result.bad_rows)})"), table]
    if result.refusal:
        shown.append(f"[red]{escape(result.refusal)}[/]")
    return shown


def show_demo(result: DemoResult, home: Path) -> Sequence[RenderableType]:
    """What the demo came to, lineages side by side."""
    shown: list[RenderableType] = []
    numbers = ["AA", "forgetting", "BWT", "FWT", "champion"]
    comparison = new_table("lineage", "strategy", *numbers, right=numbers)
    for outcome in result.outcomes:
        if outcome.matrix is None or outcome.scores is None:
            shown.append(f"[red]No version of {outcome.lineage} has passed the gate.[/]")
            continue
        shown += [heading(f"Accuracy of {outcome.lineage} ({outcome.strategy}), %"), matrix_table(outcome.matrix)]
        scores = outcome.scores
        comparison.add_row(
            outcome.lineage, outcome.strategy, percent(scores.average_accuracy), percent(scores.forgetting),
            percent(scores.backward_transfer), percent(scores.forward_transfer), f"version {outcome.champion}",
        )  # fmt: skip
    if comparison.row_count:
        shown += [heading("In the end"), comparison]
    for outcome in result.outcomes:
        for run in outcome.runs:
            if run.rejected:
                shown += [f"[red]{escape(run.message)}[/]", *(f"  • {escape(reason)}" for reason in run.reasons)]
        shown += [f"[red]{escape(message)}[/]" for message in outcome.refused]
    if result.picture is not None:
        shown.append(f"Picture:      {escape(str(result.picture))}")
    deal, option, first = this_command(), home_option(home), result.outcomes[0].lineage
    shown.append(
        escape(
            f"Look closer:  {deal} history --lineage {first}{option}\n"
            f"              {deal} ui{option}\n"
            f'              {deal} predict --lineage {first} --task parcels "My parcel is stuck at customs"{option}'
        )
    )
    return shown


def show_benchmark(result: BenchmarkResult) -> Sequence[RenderableType]:
    """A table per suite, and the cells that failed."""
    shown: list[RenderableType] = []
    numbers = ["cells", "AA", "forgetting", "BWT", "FWT", "AA minus deal (95 % CI)"]
    for found in result.tables:
        table = new_table("strategy", "order", *numbers, right=numbers)
        for row in found["rows"]:
            table.add_row(
                escape(row["strategy"] + (f" ({row['changes']})" if row["changes"] else "")),
                " and ".join(row["orders"]), str(row["num_cells"]),
                *(points(row[name]) for name in ("average_accuracy", "forgetting", "backward_transfer",
                                                 "forward_transfer")),
                interval(row.get("difference_points_ci95")),
            )  # fmt: skip
        rows, part = found["protocol"][:2]
        shown += [heading(f"Suite {found['suite']}, {rows} training rows a task, {part} test rows"), table]
    shown += [f"[red]{escape(f'{cell.file}: {cell.message}')}[/]" for cell in result.cells if cell.status == "failed"]
    return shown


def points(value: float | None) -> str:
    """A figure in points of a hundred; a dash where it is undefined."""
    return "–" if value is None else f"{value:.1f}"


def interval(values: Sequence[float] | None) -> str:
    """A difference with its interval; nothing where there is none."""
    return "" if values is None else f"{values[0]:+.1f} ({values[1]:+.1f} to {values[2]:+.1f})"


def heading(text: str) -> str:
    """A line above a table."""
    return f"\n[bold]{escape(text)}[/]"


def this_command() -> str:
    """How the running command can be called again from this shell, whether or not its environment is activated."""
    running = Path(sys.argv[0])
    if not (running.is_file() and os.access(running, os.X_OK)):
        return "deal"  # called from Python
    found = shutil.which(running.name)
    if found is not None and Path(found).samefile(running):
        return shlex.quote(running.name)
    path = Path(os.path.abspath(running))
    shown = str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
    return shlex.quote(shown if os.sep in shown else f".{os.sep}{shown}")


def home_option(home: Path) -> str:
    """The --home that a further command needs; none where it is found without."""
    if home == Path("deal-home").resolve():
        return ""
    shown = home.relative_to(Path.cwd()) if home.is_relative_to(Path.cwd()) else home
    return f" --home {shlex.quote(str(shown))}"


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
