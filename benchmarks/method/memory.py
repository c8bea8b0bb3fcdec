"""Which memory of old tasks is best: run an arm of the comparison, or compare arms.

    python -m benchmarks.method.memory run --data TASKS --arm answers --arm both --order 1 --seed 100
    python -m benchmarks.method.memory compare

Protocol: suite 9, its two orders, seeds 100 and 101, 150 training rows a task, development rows, the likeliest label as
the answer. With --unused the last version also answers training rows 200 to 999, which no arm uses: less noise, and
half an hour more. Every arm has the same rows, steps and rank. Versions are kept, so that what changes only the end of
a chain needs no new chain.

The rule, written before the first cell: an arm is adopted if its mean gain over the judged tasks is at least LEAST_GAIN
points and the 80 % t-interval over at least FEWEST_PAIRS pairs of cells lies above 0, what is learned is not lower by
more than MOST_UNLEARNED points, and no task ends lower by more than MOST_LOST points. After one pair that is worse in
accuracy and in negative log-likelihood, an arm is given up. Both cells of a pair run on one kind of processor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import numpy as np
import typer
from datasets import disable_progress_bars
from rich.console import Console
from rich.table import Table

from benchmarks.cells import benchmark_cell
from benchmarks.method import one_memory
from benchmarks.method.pairs import LEAST_GAIN, over_cells
from benchmarks.output import RESULTS
from benchmarks.stored_cells import read_stored_cells, unpack_answers
from benchmarks.tables import JUDGED, matched
from deal_core.base_model.sources import DEFAULT_BASE
from deal_core.benchmark.suites import name_of, order_of
from deal_core.benchmark.summary import CellJson, final_scores, row_scores
from deal_core.evaluation.label_scores import recentred_hits
from deal_core.method_config import DealConfig, MethodConfig, RehearsalConfig
from tasks.adaptation.run import identify_base
from tasks.benchmark import make_cell_file

CELLS = RESULTS / "memory"
SUITE, NUM_ROWS = "9", 150
FEWEST_PAIRS, MOST_UNLEARNED, MOST_LOST = 3, 0.5, 4.0
OPTIONS: dict[str, dict[str, Any]] = {
    # Experiment 1: labels and answers on the same 50 rows, which the task was not trained on.
    "answers": {},
    "both": {"beta": 0.5},
    "labels": {"beta": 1.0},
    # The same with rows that the task was trained on: a quarter of 150.
    "learned-answers": {},
    "learned-both": {"beta": 0.5},
    "learned-labels": {"beta": 1.0},
    # Experiment 2: closing steps after the training, on new and old rows alike; all layers, or the last four.
    "both-closing-25": {"beta": 0.5, "closing_steps": 25},
    "both-closing-50": {"beta": 0.5, "closing_steps": 50},
    "both-closing-25-top": {"beta": 0.5, "closing_steps": 25, "closing_layers": 4},
    "learned-both-closing-25": {"beta": 0.5, "closing_steps": 25},
    # Experiment 3: few rehearsed rows while the new task is learned, more at the end; old tasks weigh more when many.
    "both-ramp": {"beta": 0.5, "ramp": True},
    "both-root": {"beta": 0.5, "root_weight": True},
    "both-ramp-root": {"beta": 0.5, "ramp": True, "root_weight": True},
    "learned-both-ramp": {"beta": 0.5, "ramp": True},
    # Experiment 4: more rehearsed rows when there are many old tasks.
    "both-late-8": {"beta": 0.5, "late_per_step": 8},
    "both-8": {"beta": 0.5, "per_step": 8},
    "learned-both-8": {"beta": 0.5, "per_step": 8},
}
"""Arm → the options of the strategy `one_memory`, if its name begins with learned, else of `one_memory_unused`."""
STRATEGIES: dict[str, tuple[str, MethodConfig]] = {
    # Today's default, which learned-both has become.
    "deal": ("deal", MethodConfig()),
    # Experiment 9, written after the first pair: whether it is the core that costs 1.7 points of what is learned.
    "deal-free": ("deal", MethodConfig(deal=DealConfig(core="free"))),
    "plain": ("seq_lora", MethodConfig()),
    "joint": ("joint", MethodConfig()),
    # Experiment 5: replay, tuned as hard. Its rows are a quarter of the 150, every label in its share.
    "replay-4": ("replay", MethodConfig()),
    "replay-4-half": ("weighted_replay", MethodConfig(strategy_options={"weight": 0.5})),
    "replay-8": ("replay", MethodConfig(rehearsal=RehearsalConfig(per_step=8))),
}
"""Arm → its strategy and settings."""
ARMS = {
    **{
        name: (
            one_memory.OneMemory.name if name.startswith("learned") else one_memory.OneMemoryUnused.name,
            MethodConfig(strategy_options=options),
        )
        for name, options in OPTIONS.items()
    },
    **STRATEGIES,
}
app = typer.Typer(no_args_is_help=True, help=__doc__)


@dataclass(frozen=True, kw_only=True)
class Ends:
    """The figures of one cell, in percent, by judged task.

    Attributes:
        learned: Accuracy right after the task was learned, on its test rows.
        end: Accuracy of the last version, on test rows and unused rows.
        recentred: The same after subtracting a bias per label.
        nll: Negative log-likelihood of the right label, in nats, of the last version.
        hits: 0 or 1 for each row of `end`.
    """

    learned: Mapping[str, float]
    end: Mapping[str, float]
    recentred: Mapping[str, float]
    nll: Mapping[str, float]
    hits: Mapping[str, Sequence[float]]


def ends_of(cell: CellJson) -> Ends:
    """Return the figures of a cell over the judged tasks."""
    learned = {
        version["task"]: 100 * fmean(row_scores(version["scores"][version["task"]]))
        for version in cell["versions"]
        if version["task"] in JUDGED
    }
    hits, recentred, nll = {}, {}, {}
    for name in JUDGED:
        parts = [scores[name] for scores in (final_scores(cell), cell.get("unused", {})) if name in scores]
        answers = [each for part in parts if (each := unpack_answers(part)) is not None]
        log_probs_NL = np.concatenate([each.log_probs_NL for each in answers])
        targets_N = np.concatenate([each.targets_N for each in answers])
        hits[name] = [score for part in parts for score in row_scores(part)]
        recentred[name] = 100 * float(np.mean(recentred_hits(log_probs_NL, targets_N)))
        nll[name] = float(-log_probs_NL[np.arange(len(targets_N)), targets_N].mean())
    return Ends(
        learned=learned,
        end={name: 100 * fmean(each) for name, each in hits.items()},
        recentred=recentred,
        nll=nll,
        hits=hits,
    )


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


def verdict(pairs: Sequence[Pair]) -> str:
    """Return what the rule says of an arm: adopt, give up, or go on."""
    gains = [pair.end for pair in pairs]
    if len(pairs) == 1 and gains[0] < 0 and pairs[0].nll > 0:
        return "give up: accuracy and likelihood are both worse in one pair"
    if len(pairs) < FEWEST_PAIRS:
        return f"go on: {len(pairs)} of {FEWEST_PAIRS} pairs"
    low = over_cells(gains)["low"]
    if fmean(gains) < LEAST_GAIN or low <= 0:
        return f"not adopted: gain {fmean(gains):+.1f}, 80 % interval from {low:+.1f}"
    if (learned := fmean(pair.learned for pair in pairs)) < -MOST_UNLEARNED:
        return f"not adopted: it learns {learned:+.1f} points"
    worst = min((fmean(pair.by_task[name] for pair in pairs), name) for name in pairs[0].by_task)
    if worst[0] < -MOST_LOST:
        return f"not adopted: {worst[1]} ends {worst[0]:+.1f} points"
    return f"adopt: gain {fmean(gains):+.1f}, 80 % interval from {low:+.1f}"


@app.command()
def run(
    data: Annotated[Path, typer.Option(help="Folder of the tasks.")],
    arm: Annotated[list[str], typer.Option(help=f"Arms: {', '.join(ARMS)}.")],
    order: Annotated[list[str] | None, typer.Option(help="Orders of suite 9.", show_default="1")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seeds.", show_default="100")] = None,
    work: Annotated[Path, typer.Option(help="Unfinished cells; a second call goes on with them.")] = Path(
        "memory-work"
    ),
    keep: Annotated[Path, typer.Option(help="Versions of finished cells.")] = Path("memory-versions"),
    out: Annotated[Path, typer.Option(help="Folder of the cells; each arm has a folder in it.")] = CELLS,
    unused: Annotated[bool, typer.Option(help="Also let the last version answer the unused rows.")] = False,
) -> None:
    """Run the missing cells of some arms. Several processes share the work."""
    disable_progress_bars()
    base = identify_base(DEFAULT_BASE)
    for name, number, chain in ((a, s, o) for s in seed or [100] for o in order or ["1"] for a in arm):
        strategy, method = ARMS[name]
        tasks = order_of(SUITE, chain)
        cell = benchmark_cell(
            strategy, method, tasks, base=base, data=data, seed=number, rows=NUM_ROWS, scores_unused=unused
        )
        (out / name).mkdir(parents=True, exist_ok=True)
        status = make_cell_file(base, cell, method, data, out / name, work, keep / name)
        typer.echo(f"{name}, order {chain}, seed {number}: {status}")


@app.command()
def compare(
    base: Annotated[str, typer.Option(help="The arm that the others are compared with.")] = "answers",
    cells: Annotated[Path, typer.Option(help="Folder of the arms' cells.")] = CELLS,
) -> None:
    """Print each arm's figures, its differences from the base arm by pair, and what the rule says."""
    if not cells.is_dir():
        raise typer.BadParameter(f"{cells} is not there; run some arms first.")
    stored = {folder.name: read_stored_cells(folder) for folder in sorted(cells.iterdir()) if folder.is_dir()}
    figures = Table(title="Judged tasks, mean in %", title_justify="left")
    for column in ("arm", "order", "seed", "learned", "end", "re-centred", "NLL", "perplexity", "minutes"):
        figures.add_column(column, justify="left" if column == "arm" else "right")
    for name, arm in stored.items():
        for cell in arm:
            ends, perplexity = ends_of(cell), cell["perplexity"]
            seconds = sum(sum(version.get("seconds", {}).values()) for version in cell["versions"])
            figures.add_row(
                name,
                name_of(tuple(cell["settings"]["tasks"]))[1],
                str(cell["settings"]["seed"]),
                f"{fmean(ends.learned.values()):.1f}" if ends.learned else "–",
                f"{fmean(ends.end.values()):.1f}",
                f"{fmean(ends.recentred.values()):.1f}",
                f"{fmean(ends.nll.values()):.3f}",
                f"{perplexity['adapted'] / perplexity['base']:.2f}",
                f"{seconds / 60:.0f}",
            )
    console = Console()
    console.print(figures)
    differences = Table(title=f"Differences from {base}", title_justify="left")
    for column in ("arm", "pairs", "learned", "end", "re-centred", "NLL", "rule"):
        differences.add_column(column)
    for name, arm in stored.items():
        is_bound = any(version["task"] is None for cell in arm for version in cell["versions"])
        if name == base or is_bound:
            continue
        if pairs := list(pairs_of(arm, stored.get(base, []))):
            means = [
                f"{fmean(getattr(pair, figure) for pair in pairs):+.{digits}f}"
                for figure, digits in (("learned", 1), ("end", 1), ("recentred", 1), ("nll", 3))
            ]
            differences.add_row(name, str(len(pairs)), *means, verdict(pairs))
    console.print(differences)


if __name__ == "__main__":
    app()
