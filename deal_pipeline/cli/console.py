"""What a command prints: a line for each finished stage, a bar for the running one, tables, or JSON for programs."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from deal_core.evaluation.metrics import scored_otherwise
from deal_core.safe_text import printable, printable_json, without_known_secrets_inside, without_secrets
from deal_pipeline.cli.render import render, render_matrix

if TYPE_CHECKING:
    from deal_core.evaluation.accuracy_matrix import MatrixJson
    from flows.adapt_result import AdaptResult
    from tasks.arrivals import HeldArrival

WIDTH = 120
"""The width of tables in a file or a pipe."""
PROGRESS_SECONDS = 30.0
"""Time between two lines of progress where no bars are drawn."""


class _Terminal(Console):
    """A console that shows control characters of foreign text instead of obeying them."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Text for the screen. Cells of tables take this path too."""
        return super().render_str(printable(text), **options)


class Screen:
    """The terminal of one command. Results go to stdout; progress, remarks and errors to stderr.

    Bars are drawn only if stdout and stderr are terminals; else a line tells the progress now and then. With `as_json`
    only the result is printed.
    It is a `tasks.progress.Reporter`, so a flow can report to it.
    """

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json
        self.out = _Terminal(highlight=False, emoji=False, width=None if sys.stdout.isatty() else WIDTH)
        self.err = _Terminal(stderr=True, highlight=False, emoji=False)
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
        self._line(f"  [green]✓[/] {stage:<9} [dim]{seconds:6.1f} s[/]  {escape(without_secrets(detail))}")

    def said(self, message: str) -> None:
        """Print a line."""
        self._line(escape(without_secrets(message)))

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
            sys.stderr.write(printable_json(json.dumps({"error": message, "code": code}, ensure_ascii=False)) + "\n")
            sys.stderr.flush()
        else:
            self.err.print(f"[bold red]Error:[/] {escape(message)}", soft_wrap=True)

    def _line(self, markup: str) -> None:
        if self.as_json:
            return
        console = self._progress.console if self._progress is not None else self.err
        console.print(markup)


def home_option(home: Path) -> str:
    """The --home that the next command needs; empty if the default is the same folder."""
    if home == Path("deal-home").resolve():
        return ""
    shown = home.relative_to(Path.cwd()) if home.is_relative_to(Path.cwd()) else home
    return f" --home {shlex.quote(str(shown))}"


def percent(share: float | None) -> str:
    """A share in percent; a dash if undefined."""
    return "–" if share is None else f"{100 * share:.1f}"


def show_held(lineage: str, held: Sequence[HeldArrival]) -> Sequence[RenderableType]:
    """Arrivals that are held, and how each goes on."""
    return [f"  [yellow]•[/] {escape(arrival.line(lineage))}" for arrival in held]


def show_adaptation(run: AdaptResult) -> Sequence[RenderableType]:
    """The end of one adaptation."""
    color = {"promoted": "green", "rejected": "red"}.get(run.status, "yellow")
    if run.unsure and color == "green":
        color = "yellow"
    shown: list[RenderableType] = []
    if run.matrix is not None:
        scores = "   ".join(f"{name} [bold]{value}[/]" for name, value in named_scores(run.matrix).items())
        shown += [*render_matrix(run.matrix, f"Accuracy of {run.lineage}, %"), scores]
        if note := scored_otherwise(run.metrics):
            shown.append(escape(note))
    shown.append(f"[bold {color}]{escape(run.message)}[/]")
    if run.status == "held":  # the message says why
        return [*shown, *render(run.contradictions)]
    shown += [f"  • {escape(reason)}" for reason in run.reasons]
    shown += [f"  [yellow]•[/] {escape(sentence)}" for sentence in run.unsure]
    return shown


def named_scores(matrix: MatrixJson) -> dict[str, str]:
    """The scores of a matrix's last version in percent, by name. `deal version list --json` has the transfers too."""
    from deal_core.evaluation.accuracy_matrix import AccuracyMatrix  # pydantic loads slowly

    scores = AccuracyMatrix.from_json(matrix)
    return {"average accuracy": percent(scores.average_accuracy), "forgetting": percent(scores.forgetting)}
