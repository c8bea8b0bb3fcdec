"""The final table: one adapter that goes on learning, retraining on everything, and replay of the same rows.

    python -m benchmarks.headline run --data TASKS --arm deal --arm replay --order 1 --seed 4
    python -m benchmarks.headline

The first command makes the missing cells; several processes share the work. The second prints the table from the stored
cells and trains nothing. Its first line is the claim of the README. `page` writes docs/benchmark.md from them.

Protocol, written before the first cell: the nine tasks of suite 9 in orders 1 and 2, 150 training rows a task, seeds 4,
5 and 6, which chose no setting. Every arm has the same rows, steps, rank and learning rate. The answer is the likeliest
label; the rows that are scored, 300 a task, chose no setting either. Figures are means over the seven tasks that this
small model can learn (JUDGED). Two cells make a pair if they have the same seed and order and ran on one kind of
processor. Retraining on everything has no order.

The rule, written before the first cell: one arm is ahead of another if the 95 % t-interval of the differences of at
least FEWEST_PAIRS pairs does not hold 0. Otherwise no difference was found.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from textwrap import fill
from typing import Annotated

import numpy as np
import typer
from datasets import disable_progress_bars
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.stats import t as student_t

from benchmarks.cells import benchmark_cell, make_cell_file
from benchmarks.continual.cell import unpack_answers
from benchmarks.continual.paired import PairedInterval
from benchmarks.continual.suites import name_of, order_of
from benchmarks.continual.summary import (
    JUDGED,
    CellJson,
    accuracy,
    final_scores,
    interval_over_rows,
    matched,
    read_cells,
    row_scores,
)
from benchmarks.continual.summary import order_of as order_of_cell
from benchmarks.output import RESULTS, templates
from deal_core.base_model.sources import DEFAULT_BASE
from deal_core.evaluation.label_scores import recentred_hits
from deal_core.method_config import MethodConfig, RehearsalConfig
from infra.report.figures import COLOURS, MUTED, new_figure, save_png, tidy
from tasks.adaptation.run import identify_base

CELLS = RESULTS / "final"
PAGE, PICTURE, WIDTH = Path("docs/benchmark.md"), "benchmark.png", 120
SUITE, NUM_ROWS = "9", 150
OURS, BOUND, RIVAL = "deal", "retrain", "replay"
MADE_OF = f"`{OURS}` is replay with a conservative update inspired by DEAL."
ARMS: dict[str, tuple[str, MethodConfig]] = {
    BOUND: ("joint", MethodConfig()),
    OURS: ("deal", MethodConfig()),
    RIVAL: ("replay", MethodConfig()),
    "deal-keeps-nothing": ("deal", MethodConfig(rehearsal=RehearsalConfig(rows=0))),
    "plain": ("seq_lora", MethodConfig()),
}
"""Arm → its strategy and settings."""
SHOWN = (OURS, RIVAL, "plain")
"""Arms of the picture."""
KEPT = RehearsalConfig().num_kept(NUM_ROWS)
KEEPS = {
    BOUND: "all rows",
    OURS: f"{KEPT} rows, with labels",
    RIVAL: f"{KEPT} rows, with labels",
    "deal-keeps-nothing": "nothing",
    "plain": "nothing",
}
"""Arm → what it keeps of an old task's data."""
NUM_RESAMPLES, CONFIDENCE, FEWEST_PAIRS = 2000, 0.95, 3
app = typer.Typer(invoke_without_command=True, help=__doc__)


@dataclass(frozen=True, kw_only=True)
class Ends:
    """The figures of one cell, in percent, by judged task.

    Attributes:
        learned: Accuracy right after the task was learned, on its test rows.
        end: Accuracy of the last version, on the same rows.
        recentred: The same after subtracting a bias per label.
        nll: Negative log-likelihood of the right label, in nats, of the last version.
    """

    learned: Mapping[str, float]
    end: Mapping[str, float]
    recentred: Mapping[str, float]
    nll: Mapping[str, float]


def ends_of(cell: CellJson) -> Ends:
    """Return the figures of a cell over the judged tasks."""
    learned = {
        version["task"]: 100 * fmean(row_scores(version["scores"][version["task"]]))
        for version in cell["versions"]
        if version["task"] in JUDGED
    }
    end, recentred, nll = {}, {}, {}
    for name in JUDGED:
        score = final_scores(cell)[name]
        answers = unpack_answers(score)
        assert answers is not None, "judged tasks have labels"
        end[name] = 100 * accuracy(score)
        recentred[name] = 100 * float(np.mean(recentred_hits(answers.log_probs_NL, answers.targets_N)))
        nll[name] = float(-answers.log_probs_NL[np.arange(len(answers.targets_N)), answers.targets_N].mean())
    return Ends(learned=learned, end=end, recentred=recentred, nll=nll)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two cells of one order, seed and kind of processor, and the differences of their figures: arm minus base."""

    order: str
    seed: int
    learned: float
    end: float
    recentred: float
    nll: float
    by_task: Mapping[str, float]


def pairs_of(arm: Sequence[CellJson], base: Sequence[CellJson]) -> Iterator[Pair]:
    """Yield the pairs of two arms; cells of different kinds of processors make none."""
    for cell, other in matched(arm, base):
        ours, theirs = ends_of(cell), ends_of(other)

        def difference(name: str, ours: Ends = ours, theirs: Ends = theirs) -> float:
            return fmean(getattr(ours, name).values()) - fmean(getattr(theirs, name).values())

        yield Pair(
            order=name_of(tuple(cell["settings"]["tasks"]))[1],
            seed=cell["settings"]["seed"],
            learned=difference("learned"),
            end=difference("end"),
            recentred=difference("recentred"),
            nll=difference("nll"),
            by_task={name: ours.end[name] - theirs.end[name] for name in ours.end},
        )


@dataclass(frozen=True, kw_only=True)
class Figures:
    """The figures of one arm: means over its cells and the judged tasks, in percent where nothing else is said."""

    arm: str
    keeps: str
    num_cells: int
    learned: float | None
    """Accuracy right after a task was learned; None: nothing was learned one after the other."""
    end: float
    recentred: float
    """Accuracy in the end, after subtracting a bias per label."""
    nll: float
    """Negative log-likelihood of the right label in the end, in nats."""
    perplexity: float
    """Perplexity of other English in the end, times the base model's."""
    all_tasks: float
    """Accuracy in the end over all tasks, also those that this model cannot learn."""
    by_task: Mapping[str, float]
    """Task → accuracy in the end."""
    learned_by_task: Mapping[str, float]
    """Task → accuracy right after it was learned; empty if nothing was learned one after the other."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What our arm has more than another one, in points of accuracy in the end."""

    other: str
    pairs: Sequence[Pair]
    over_rows: PairedInterval

    @property
    def mean(self) -> float:
        """The mean over the pairs."""
        return fmean(pair.end for pair in self.pairs)

    @property
    def over_pairs(self) -> tuple[float, float] | None:
        """The 95 % t-interval; None for one pair."""
        return t_interval([pair.end for pair in self.pairs])

    @property
    def is_found(self) -> bool:
        """Whether the rule says that the arms differ."""
        if self.over_pairs is None or len(self.pairs) < FEWEST_PAIRS:
            return False
        return self.over_pairs[0] > 0 or self.over_pairs[1] < 0


def figures_of(arm: str, cells: Sequence[CellJson]) -> Figures:
    """Return the figures of an arm."""
    ends = [ends_of(cell) for cell in cells]
    learned = [fmean(each.learned.values()) for each in ends if each.learned]
    return Figures(
        arm=arm,
        keeps=KEEPS[arm],
        num_cells=len(cells),
        learned=fmean(learned) if learned else None,
        end=fmean(_mean(each, "end") for each in ends),
        recentred=fmean(_mean(each, "recentred") for each in ends),
        nll=fmean(_mean(each, "nll") for each in ends),
        perplexity=fmean(cell["perplexity"]["adapted"] / cell["perplexity"]["base"] for cell in cells),
        all_tasks=100 * fmean(accuracy(score) for cell in cells for score in final_scores(cell).values()),
        by_task={name: fmean(each.end[name] for each in ends) for name in JUDGED},
        learned_by_task={name: fmean(each.learned[name] for each in ends) for name in JUDGED if learned},
    )


def difference_of(other: str, cells: Sequence[CellJson], others: Sequence[CellJson]) -> Difference | None:
    """Return the difference of our cells from those of another arm; None if no two make a pair."""
    pairs = matched(cells, others)
    if not pairs:
        return None
    sides = map(list, zip(*pairs, strict=True))
    return Difference(other=other, pairs=[*pairs_of(cells, others)], over_rows=interval_over_rows(*sides, JUDGED))


def _mean(ends: Ends, name: str) -> float:
    return fmean(getattr(ends, name).values())


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The interval of Student's t around the mean; None for fewer than two values."""
    if len(values) < 2:
        return None
    half = float(student_t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return fmean(values) - half, fmean(values) + half


def share_of(pairs: Sequence[tuple[CellJson, CellJson]]) -> tuple[float, tuple[float, float]]:
    """Accuracy of the first cells in percent of that of the second ones, and its interval over resampled test rows.

    A row is one unit in all cells. Rows are drawn within their task, so every task keeps its weight.
    """
    generator = np.random.default_rng(0)
    ours, theirs, tops, bottoms = 0.0, 0.0, np.zeros(NUM_RESAMPLES), np.zeros(NUM_RESAMPLES)
    for name in JUDGED:
        # for every test row, the mean score over the cells in the end
        first, second = (
            np.array([row_scores(final_scores(cell)[name]) for cell in cells]).mean(0)
            for cells in zip(*pairs, strict=True)
        )
        ours, theirs = ours + first.mean(), theirs + second.mean()
        drawn = generator.integers(0, len(first), (NUM_RESAMPLES, len(first)))
        tops += first[drawn].mean(1)
        bottoms += second[drawn].mean(1)
    low, high = np.quantile(tops / bottoms, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return 100 * float(ours / theirs), (100 * float(low), 100 * float(high))


def claim(stored: Mapping[str, Sequence[CellJson]]) -> str:
    """Return the claim: what our arm is made of, its accuracy in the end beside the others', and what the rule says."""
    ours, rival, bound = (figures_of(name, stored[name]).end for name in (OURS, RIVAL, BOUND))
    lead = difference_of(RIVAL, stored[OURS], stored[RIVAL])
    assert lead is not None, "the arms have a pair"
    num_pairs = len(lead.pairs)
    if num_pairs < FEWEST_PAIRS:
        so_far = "is one pair" if num_pairs == 1 else f"are {num_pairs} pairs"
        verdict = (
            f"The rule asks for {FEWEST_PAIRS} pairs of runs to say whether `{OURS}` or replay is better; so far there "
            f"{so_far}"
        )
    else:
        assert lead.over_pairs is not None, "there are several pairs"
        low, high = sorted(lead.over_pairs if lead.mean > 0 else [-end for end in lead.over_pairs])
        between = f"{low:.1f} to {high:.1f} over {num_pairs} pairs of runs"
        better, worse = (f"`{OURS}`", "replay") if lead.mean > 0 else ("Replay", f"`{OURS}`")
        verdict = f"{better} is better than {worse} ({abs(lead.mean):.1f} points, {between})"
        if not lead.is_found:
            verdict = f"{better} ended {abs(lead.mean):.1f} points higher ({between}). The rule finds no difference"
    return (
        f"{MADE_OF} After {len(stored[OURS][0]['settings']['tasks'])} arrivals it ends at {ours:.1f} % accuracy, "
        f"replay of the same rows at {rival:.1f} %, and retraining on all rows at {bound:.1f} %. {verdict}."
    )


def read_arms(folder: Path = CELLS) -> dict[str, list[CellJson]]:
    """Return the stored cells of every arm that has some: ours, and those of the others that make a pair with ours.

    So all means of a table are over the same seeds and orders.

    Raises:
        typer.BadParameter: An arm that the claim compares has none, or the cells are of different rows.
    """
    ours = read_cells(folder / OURS)
    stored = {}
    for name in ARMS:
        if cells := [cell for cell in read_cells(folder / name) if matched(ours, [cell])]:
            stored[name] = cells
    for name in (BOUND, OURS, RIVAL):
        if name not in stored:
            raise typer.BadParameter(f"{folder / name} has no cell; run `python -m benchmarks.headline run` first.")
    if len({cell["settings"]["data"] for cells in stored.values() for cell in cells}) > 1:
        raise typer.BadParameter(f"{folder} has runs of different rows (their field `data`); give --out a new folder.")
    return stored


def text(stored: Mapping[str, Sequence[CellJson]], template: str = "headline.md.j2", width: int | None = None) -> str:
    """Return the claim and the tables as Markdown. The claim is one line, or lines of at most `width` characters."""
    rivals = {name: cells for name, cells in stored.items() if name not in (OURS, BOUND)}
    differences = (difference_of(name, stored[OURS], cells) for name, cells in rivals.items())
    to_bound = {name: matched(cells, stored[BOUND]) for name, cells in stored.items() if name != BOUND}
    return (
        templates()
        .get_template(template)
        .render(
            claim=fill(claim(stored), width) if width else claim(stored),
            figures=[figures_of(name, cells) for name, cells in stored.items()],
            shares={name: share_of(of_arm) for name, of_arm in to_bound.items() if of_arm},
            differences=[difference for difference in differences if difference],
            tasks=JUDGED,
            rows=NUM_ROWS,
            kept=KEPT,
            num_tasks=len(stored[OURS][0]["settings"]["tasks"]),
            seeds=sorted({cell["settings"]["seed"] for cell in stored[OURS]}),
            orders=sorted({order_of_cell(cell) for cell in stored[OURS]}),
            processors=len({f"{cell['perplexity']['base']:.3f}" for cells in stored.values() for cell in cells}),
        )
    )


def kept_figure(arms: Sequence[Figures], bound: Figures) -> Figure:
    """One row per task: its accuracy right after it was learned (hollow) and in the end (filled), per arm.

    A bar marks what retraining on everything reaches.
    """
    figure = new_figure(8.0, 1.2 + 0.5 * len(JUDGED))
    axes = figure.subplots()
    for number, (arm, colour) in enumerate(zip(arms, COLOURS, strict=False)):
        offset = 0.2 * (number - (len(arms) - 1) / 2)
        for row, task in enumerate(JUDGED):
            learned, end = arm.learned_by_task[task], arm.by_task[task]
            axes.plot([learned, end], [row + offset] * 2, color=colour, linewidth=1.6, alpha=0.55, zorder=1)
            axes.plot(learned, row + offset, "o", color=colour, markerfacecolor="white", markersize=5, zorder=2)
            axes.plot(end, row + offset, "o", color=colour, markersize=5.5, zorder=3)
    for row, task in enumerate(JUDGED):
        axes.plot([bound.by_task[task]] * 2, [row - 0.4, row + 0.4], color=MUTED, linewidth=1.6, zorder=2)
    tidy(axes)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.8)
    axes.set_yticks(range(len(JUDGED)), JUDGED)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("accuracy, %: hollow right after the task was learned, filled in the end", color=MUTED)
    handles = [
        *(
            Line2D([], [], color=colour, marker="o", linewidth=1.6, label=arm.arm)
            for arm, colour in zip(arms, COLOURS, strict=False)
        ),
        Line2D([], [], color=MUTED, linewidth=1.6, label="retraining on everything"),
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), frameon=False, fontsize=9)
    return figure


@app.callback()
def main(context: typer.Context) -> None:
    """Print the claim and the tables, if no command is given."""
    if context.invoked_subcommand is None:
        typer.echo(text(read_arms()))


@app.command()
def page(
    cells: Annotated[Path, typer.Option(help="Folder of the arms' cells.")] = CELLS,
    out: Annotated[Path, typer.Option(help="Page to write; its picture goes to img beside it.")] = PAGE,
) -> None:
    """Write the page of the benchmark: the claim, the tables, a picture, and what was compared."""
    stored = read_arms(cells)
    out.write_text(text(stored, "benchmark.md.j2", WIDTH), encoding="utf-8")
    arms = {name: figures_of(name, of_arm) for name, of_arm in stored.items()}
    (out.parent / "img").mkdir(exist_ok=True)
    save_png(kept_figure([arms[name] for name in SHOWN if name in arms], arms[BOUND]), out.parent / "img" / PICTURE)


@app.command()
def run(
    data: Annotated[Path, typer.Option(help="Folder of the tasks.")],
    arm: Annotated[list[str] | None, typer.Option(help="Arms.", show_default=", ".join(ARMS))] = None,
    order: Annotated[list[str] | None, typer.Option(help="Orders of suite 9.", show_default="1, 2")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seeds.", show_default="4, 5, 6")] = None,
    work: Annotated[Path, typer.Option(help="Unfinished cells; a second call goes on with them.")] = Path("final-work"),
    out: Annotated[Path, typer.Option(help="Folder of the cells; each arm has a folder in it.")] = CELLS,
) -> None:
    """Run the missing cells of some arms."""
    disable_progress_bars()
    base = identify_base(DEFAULT_BASE)
    for number, chain, name in ((s, o, a) for s in seed or [4, 5, 6] for o in order or ["1", "2"] for a in arm or ARMS):
        strategy, method = ARMS[name]
        cell = benchmark_cell(
            strategy,
            method,
            order_of(SUITE, chain),
            base=base,
            data=data,
            seed=number,
            rows=NUM_ROWS,
            part="reported",
        )
        (out / name).mkdir(parents=True, exist_ok=True)
        typer.echo(
            f"{name}, order {chain}, seed {number}: {make_cell_file(base, cell, method, data, out / name, work)}"
        )


if __name__ == "__main__":
    app()
