"""What a command prints: a line for each finished stage, a bar for the running one, tables, or JSON for programs."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from deal_core.evaluation.interval import SURE_ROWS, score_text
from deal_core.evaluation.metrics import scored_otherwise
from deal_core.safe_text import printable, printable_json, without_known_secrets_inside, without_secrets

if TYPE_CHECKING:
    from flows.adapt_result import AdaptResult, Scores
    from tasks.arrivals import HeldArrival
    from tasks.references import Contradiction

WIDTH = 120
"""The width of tables in a file or a pipe."""
STAGES = "DEAL_STAGES"
"""With this environment variable, a command with --json prints stages and remarks to stderr, as lines of JSON."""


PROGRESS_SECONDS = 30.0
"""Time between two lines of progress where no bars are drawn."""
LONG_WORD = 20
"""A longer word, such as a path, may be broken on a narrow screen."""


class _FittingTable(Table):
    """A table that breaks no word on a narrow screen, and leaves columns out if there is no other way."""

    spare: Sequence[str] = ()
    """Headers of the columns that may be left out, the first one first."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw the columns that fit. If the words of the others do not fit either, they are broken."""
        columns = [dataclasses.replace(column, min_width=_longest_word(column)) for column in self.columns]
        for name in self.spare:
            if not _fits(columns, options.max_width):
                columns = [column for column in columns if column.header != name]
        if not _fits(columns, options.max_width):
            columns = [dataclasses.replace(column, min_width=None) for column in columns]
        shown = copy.copy(self)
        shown.columns = [dataclasses.replace(column, _index=index) for index, column in enumerate(columns)]
        yield from Table.__rich_console__(shown, console, options)


def _longest_word(column: Column) -> int:
    texts = [str(column.header), *(cell for cell in column.cells if isinstance(cell, str))]
    words = [word for text in texts for word in Text.from_markup(text).plain.split()]
    return min(max((len(word) for word in words), default=0), LONG_WORD)


def _fits(columns: Sequence[Column], width: int) -> bool:
    """Return whether the columns fit if each is as wide as its longest word; three characters are between two."""
    return sum((column.min_width or 0) + 3 for column in columns) - 1 <= width


class _Terminal(Console):
    """A console that shows control characters of foreign text instead of obeying them."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Text for the screen. Cells of tables take this path too."""
        return super().render_str(printable(text), **options)


class Screen:
    """The terminal of one command. Results go to stdout; progress, remarks and errors to stderr.

    Bars are drawn only if stdout and stderr are terminals; else a line tells the progress now and then. With `as_json`
    only the result is printed, or stages and remarks too, if STAGES is set.
    It is a `tasks.progress.Reporter`, so a flow can report to it.
    """

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json
        self.out = _Terminal(highlight=False, emoji=False, width=None if sys.stdout.isatty() else WIDTH)
        self.err = _Terminal(stderr=True, highlight=False, emoji=False)
        self._tells = as_json and STAGES in os.environ
        self.draws = not as_json and sys.stdout.isatty() and sys.stderr.isatty()
        self._progress: Progress | None = None
        self._bar: TaskID | None = None
        self._last_line = time.monotonic()
        """When the last line of progress was printed."""

    # --- reporter of a run ---

    def stage_started(self, stage: str) -> None:
        """Show a bar for the stage. Its total is not known yet."""
        if self._progress is None:
            return
        if self._bar is not None:
            self._progress.remove_task(self._bar)
        self._bar = self._progress.add_task(printable(stage), total=None, detail="")

    def advanced(self, stage: str, done: float, total: float | None, detail: str = "") -> None:
        """Move the bar. Without bars, print a line every PROGRESS_SECONDS."""
        if not self.draws and time.monotonic() - self._last_line >= PROGRESS_SECONDS:
            self._last_line = time.monotonic()
            share = f"{done:g}" if total is None else f"{done:g} of {total:g}"
            self._line(escape(f"    {stage:<9} {share} {without_secrets(detail)}".rstrip()))
        if self._progress is not None and self._bar is not None:
            self._progress.update(
                self._bar, description=printable(stage), completed=done, total=total, detail=printable(detail)
            )

    def stage_finished(self, stage: str, seconds: float, detail: str) -> None:
        """Replace the bar by a line."""
        if self._progress is not None and self._bar is not None:
            self._progress.remove_task(self._bar)
            self._bar = None
        detail = without_secrets(detail)
        self._tell({"stage": stage, "seconds": seconds, "detail": detail})
        self._line(f"  [green]✓[/] {stage:<9} [dim]{seconds:6.1f} s[/]  {escape(detail)}")

    def said(self, message: str) -> None:
        """Print a line."""
        message = without_secrets(message)
        self._tell({"said": message})
        self._line(escape(message))

    # --- what commands call ---

    @contextmanager
    def working(self, doing: str = "") -> Iterator[None]:
        """Draw bars for the stages reported inside. `doing` is shown until the first stage begins."""
        if not self.draws or self._progress is not None:  # nothing is drawn, or a flow inside a command is
            if doing:
                self.stage_started(doing)
            yield
            return
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description:<9}", markup=False),
            BarColumn(bar_width=30),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[detail]}", style="dim", markup=False),
        )
        with Progress(*columns, console=self.err, transient=True) as self._progress:
            if doing:
                self.stage_started(doing)
            try:
                yield
            finally:
                self._bar = self._progress = None

    def result(self, value: Any, *shown: RenderableType) -> None:
        """Print a command's result: `value` as JSON with --json, else the lines and tables of `shown`."""
        if self.as_json:
            text = json.dumps(without_known_secrets_inside(value), ensure_ascii=False, indent=2, allow_nan=False)
            sys.stdout.write(printable_json(text) + "\n")
            sys.stdout.flush()  # the command may not have ended yet
            return
        for renderable in shown:
            self.out.print(renderable, soft_wrap=isinstance(renderable, str))

    def error(self, message: str, code: str) -> None:
        """One line on stderr that says what went wrong and what to do; with --json also the error's code."""
        message = without_secrets(message)
        if self.as_json:
            _write_event({"error": message, "code": code})
        else:
            self.err.print(f"[bold red]Error:[/] {escape(message)}", soft_wrap=True)

    def _tell(self, event: dict[str, Any]) -> None:
        if self._tells:
            _write_event(event)

    def _line(self, markup: str) -> None:
        if self.as_json:
            return
        console = self._progress.console if self._progress is not None else self.err
        console.print(markup)


def _write_event(event: dict[str, Any]) -> None:
    sys.stderr.write(printable_json(json.dumps(event, ensure_ascii=False)) + "\n")
    sys.stderr.flush()


def home_option(home: Path) -> str:
    """The --home that the next command needs; empty if the default is the same folder."""
    if home == Path("deal-home").resolve():
        return ""
    shown = home.relative_to(Path.cwd()) if home.is_relative_to(Path.cwd()) else home
    return f" --home {shlex.quote(str(shown))}"


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


def new_table(*columns: str, right: Sequence[str] = (), spare: Sequence[str] = ()) -> Table:
    """An empty table.

    Args:
        columns: the headers.
        right: columns that hold numbers.
        spare: columns that are left out on a narrow screen, the first one first.
    """
    table = _FittingTable(box=box.SIMPLE_HEAD, pad_edge=False)
    table.spare = spare
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def show_held(lineage: str, held: Sequence[HeldArrival]) -> Sequence[RenderableType]:
    """Arrivals that are held, and how each goes on."""
    return [f"  [yellow]•[/] {escape(arrival.line(lineage))}" for arrival in held]


def matrix_table(matrix: Mapping[str, Any]) -> Table:
    """The accuracy matrix (its JSON): one row per version, one column per task, the untouched base model first.

    A number of test rows that all cells of a task share stands in the task's title.
    """
    from deal_core.evaluation.accuracy_matrix import AccuracyMatrix  # numpy loads slowly

    scores = AccuracyMatrix.from_json(matrix)
    titles, columns = [], []
    for task, column in zip(scores.tasks, zip(*scores.cells, strict=True), strict=True):
        sizes = {cell.num_rows for cell in column if cell.share is not None}
        shared = sizes.pop() if len(sizes) == 1 else None
        is_shared = shared is not None and shared < SURE_ROWS
        titles.append(f"{task}, n {shared}" if is_shared else task)
        columns.append([score_text(*cell, names_n=not is_shared) for cell in column])
    table = new_table("after learning", *titles, right=titles)
    base, *versions = zip(*columns, strict=True)
    table.add_row("(base model)", *base, style="dim")
    for learned, row in zip(scores.learned, versions, strict=True):
        cells = [f"[bold]{cell}[/]" if task == learned else cell for task, cell in zip(scores.tasks, row, strict=True)]
        table.add_row(learned, *cells)
    return table


def show_adaptation(run: AdaptResult) -> Sequence[RenderableType]:
    """The end of one adaptation."""
    color = {"promoted": "green", "rejected": "red"}.get(run.status, "yellow")
    if run.unsure and color == "green":
        color = "yellow"
    shown: list[RenderableType] = []
    if run.matrix is not None and run.scores is not None:
        scores = "   ".join(f"{name} [bold]{value}[/]" for name, value in named_scores(run.scores).items())
        shown += [heading(f"Accuracy of {run.lineage}, %"), matrix_table(run.matrix), scores]
        if told := scored_otherwise(run.metrics):
            shown.append(escape(told))
    shown.append(f"[bold {color}]{escape(run.message)}[/]")
    if run.status == "held":  # the message says why
        return [*shown, *show_contradictions(run.contradictions)]
    shown += [f"  • {escape(reason)}" for reason in run.reasons]
    shown += [f"  [yellow]•[/] {escape(sentence)}" for sentence in run.unsure]
    return shown


def show_contradictions(rows: Sequence[Contradiction]) -> Sequence[RenderableType]:
    """Rows of an arrival that the champion contradicts; with their texts, where they may be shown."""
    table = new_table("row", "text", "label", "champion", right=["row"])
    for row in rows:
        table.add_row(escape(row.place), *(escape(text or "–") for text in (row.text, row.label, row.answer)))
    return [table] if any(row.text for row in rows) else [f"  • {escape(row.place)}" for row in rows]


def named_scores(scores: Scores) -> dict[str, str]:
    """The scores of a version in percent, by name. `--json` and MLflow have BWT and FWT too."""
    return {"average accuracy": percent(scores.average_accuracy), "forgetting": percent(scores.forgetting)}
