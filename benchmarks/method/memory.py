"""Does `deal` beat replay of the same rows where few rows are kept, and what should it be made of?

    python -m benchmarks.method.memory chain --data TASKS --order 1 --seed 102 --arm deal --kept 10
    python -m benchmarks.method.memory fork --data TASKS --chain chain-1-102-deal-10 --arm replay --kept 5
    python -m benchmarks.method.memory score
    python -m benchmarks.method.memory page

A chain learns the nine tasks of suite 9 one after another. It keeps every version in a folder, and a second call goes
on where the first one stopped. A fork learns the last task again from the second last version of a chain, with another
arm, another seed or another number of kept rows. Both score their versions and write one JSON file, a cell, of right
and wrong answers and of the labels' log-probabilities. `score` makes the table from the cells; with --work it first
scores what is trained and not yet scored. `page` writes benchmarks/few_rows.md and its picture from the cells.

Protocol: 150 training rows a task, three passes, rank 16. The answer is the likeliest label. The mean is over the seven
tasks that this small model can learn (JUDGED). Kept rows of a task are nested: the ten that a chain keeps are the first
ten of its 38, so a fork is given the rows that its chain would have kept. Nothing is ever scored on the reported rows.

| part | rows of a task | scored |
|---|---|---|
| dev | the first 200 test rows | the new task right after it was learned; all judged tasks in the end |
| unused | training rows 200 to 699 | judged tasks in the end |

Primary figure: accuracy in the end. Further ones: re-centred accuracy (every label answered as often as it occurs), TB
(negative log-likelihood of the right label after a temperature and a bias per label, fitted on the other half of a
task's rows), accuracy right after a task was learned, the newest task, and the perplexity of other English as a
multiple of the base model's. Two cells are compared only if they ran on one kind of processor.

Stages and rules, written before the first run. Seeds begin with 102.

E, first: `deal` and `replay` with 10 kept rows, full chains of orders 1 and 2. Replay with no kept rows is plain LoRA.
    The other numbers, 0, 5, 20 and 38, are forks of the last task, with the arms `deal`, `deal-labels`, `free` and
    `replay`. (A free core with labels alone was to be a fifth arm. It is replay, byte for byte.) A fork starts from the
    chain of its own method and, for a pair on one parent, from the other's. Rule: the default is the fewest rows at
    which `deal` is within 1.0 points of itself with 38 rows and ahead of replay of the same rows.
F, second: three tasks of SuperNI with free answers: `deal`, `free`, replay of the parent's own answers that pass the
    metric, and `replay`. Rule: the best in the end is the default for free text, if its perplexity stays below 1.5.

The stages A, C, B and D and all arms but `deal` and `replay` were not run; docs/findings.md says so, and names the
commit that has their rules.

Shapes: N rows, L labels.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import numpy as np
import typer
from datasets import Dataset, disable_progress_bars
from filelock import FileLock
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from scipy.optimize import minimize
from scipy.special import log_softmax

import benchmarks
from benchmarks.continual.summary import JUDGED
from benchmarks.output import RESULTS, describe_machine, templates
from deal_core.adapter.files import ADAPTER_FILES, METHOD_TENSORS_FILE
from deal_core.adapter.state import adapter_on, load_method_state
from deal_core.base_model.load import BaseModel
from deal_core.base_model.sources import DEFAULT_BASE
from deal_core.config import AdapterConfig, TrainConfig
from deal_core.data.collate import encode_rows
from deal_core.data.order import stratified_sample
from deal_core.data.schema import TaskSchema
from deal_core.evaluation.label_scores import Floats, label_scores, recentred_hits
from deal_core.general.perplexity import perplexity
from deal_core.method_config import MethodConfig, RehearsalConfig
from deal_core.regular_file import complete_file
from deal_core.strategies.kept_rows import pack, rows_name
from deal_core.strategies.rehearsal import RehearsedRow
from deal_core.training.train import TrainingSetup, train_adapter
from infra.report.figures import COLOURS, MARKERS, MUTED, new_figure, save_png, tidy
from tasks.adaptation.run import identify_base
from tasks.base import cached_base

CELLS = RESULTS / "memory"
FREE_TEXT = CELLS / "free_text"
"""Cells of `benchmarks.compare` on the suite superni8."""
LIFTED = ("samsum_summary", "sciq_answer_generation", "evalution_relation_extraction")
"""The three tasks of superni8 on which an adapter of its own beats the commonest answer."""
PAGE, PICTURE = Path("benchmarks/few_rows.md"), Path("docs/img/few_rows.png")
ORDERS = {
    "1": ("yelp", "amazon", "MNLI", "IMDB", "SST-2", "dbpedia", "agnews", "yahoo", "BoolQA"),
    "2": ("BoolQA", "yahoo", "agnews", "dbpedia", "SST-2", "IMDB", "MNLI", "amazon", "yelp"),
}
"""The two orders of suite 9."""
NUM_ROWS = 150
PARTS = {"dev": ("test", 0, 200), "unused": ("train", 200, 700)}
"""Part of the scored rows → the file it is from, its first row, and the row after its last one."""
VERSION_FILE = "version.json"
ARMS = ("replay", "deal")
"""Strategies that are compared, with their defaults."""
app = typer.Typer(no_args_is_help=True, help=__doc__)


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task of the benchmark with its rows, columns input and output."""

    schema: TaskSchema
    rows: Mapping[str, Sequence[Mapping[str, str]]]
    """File, train or test → its rows in order."""

    def part(self, part: str) -> Dataset:
        """The rows of one of PARTS."""
        file, first, last = PARTS[part]
        return Dataset.from_list([dict(row) for row in self.rows[file][first:last]])

    def training(self) -> Dataset:
        """The rows that every arm is trained on."""
        return Dataset.from_list([dict(row) for row in self.rows["train"][:NUM_ROWS]])


def read_tasks(data: Path) -> dict[str, Task]:
    """Read the tasks of ORDERS from a folder with tasks.json, and TASK.train.jsonl and TASK.test.jsonl."""
    described, tasks = json.loads((data / "tasks.json").read_text()), {}
    for name in ORDERS["1"]:
        schema = TaskSchema(
            name=name, labels=tuple(described[name]["labels"]), instruction=described[name]["instruction"]
        )
        rows = {
            file: [
                {"input": row["text"].strip(), "output": row["label"].strip()}
                for row in map(json.loads, (data / f"{name}.{file}.jsonl").open(encoding="utf-8"))
            ]
            for file in ("train", "test")
        }
        tasks[name] = Task(schema=schema, rows=rows)
    return tasks


@dataclass(frozen=True, kw_only=True)
class Version:
    """One version: the tasks up to its own, and how it learned the last of them.

    Attributes:
        tasks: Tasks in order of arrival; the last one is the version's own.
        arm: One of ARMS.
        kept: Rows that are kept of a task.
        seed: Seed of the adapter's start and of the order of rows.
    """

    tasks: tuple[str, ...]
    arm: str
    kept: int
    seed: int

    def train_config(self) -> TrainConfig:
        """Return the settings of the training."""
        return TrainConfig(max_prompt_tokens=160, checkpoint_steps=20, seed=self.seed)


def learn(base: BaseModel, tasks: Mapping[str, Task], version: Version, parent: Path | None, folder: Path) -> None:
    """Train a version into a folder, unless it is there. VERSION_FILE is written last and marks it as complete."""
    if (folder / VERSION_FILE).is_file():
        return
    *olds, new = version.tasks
    checkpoints = folder.with_name(f"{folder.name}-checkpoints")
    setup = TrainingSetup(
        task=tasks[new].schema,
        old_tasks=tuple(tasks[name].schema for name in olds),
        strategy=version.arm,
        adapter=AdapterConfig(),
        method=MethodConfig(rehearsal=RehearsalConfig(rows=version.kept)),
        train=version.train_config(),
    )
    started = time.perf_counter()
    result = train_adapter(
        base,
        tasks[new].training(),
        setup,
        parent_folder=parent,
        output_folder=folder,
        checkpoint_folder=checkpoints,
    )
    facts = {
        "task": new,
        "arm": version.arm,
        "kept": version.kept,
        "seed": version.seed,
        "num_steps": result.num_steps,
        "seconds": time.perf_counter() - started,
        "rows_per_second": result.rows_per_second,
        "resumed_from_step": result.resumed_from_step,
        "notes": list(result.notes),
        "rows": digest_of([*tasks[new].training()]),
        "commit": commit(),
        "machine": describe_machine(),
    }
    write_json(folder / VERSION_FILE, facts)
    shutil.rmtree(checkpoints, ignore_errors=True)


def give_kept_rows(
    base: BaseModel, tasks: Mapping[str, Task], parent: Path, olds: Sequence[str], kept: int, seed: int, folder: Path
) -> None:
    """Copy a version, with the rows that its chain would have kept of each task if it kept `kept` of them.

    The rows depend on the task's training rows and the chain's seed alone, and fewer rows are the first ones of more.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in ADAPTER_FILES:
        if name != METHOD_TENSORS_FILE and (parent / name).is_file():
            shutil.copyfile(parent / name, folder / name)
    train = TrainConfig(max_prompt_tokens=160)
    tensors = {}
    for task in [tasks[name] for name in olds] if kept else []:
        encoded = encode_rows(
            task.training(),
            base.tokenizer,
            task.schema,
            max_prompt_tokens=train.max_prompt_tokens,
            max_answer_tokens=train.answer_tokens(task.schema.labels),
        )
        rows = [RehearsedRow(row["prompt_ids"], row["answer_ids"]) for row in encoded]
        num_kept = RehearsalConfig(rows=kept).num_kept(len(rows))
        places = stratified_sample([tuple(row.answer_ids) for row in rows], num_kept, seed)
        tensors[rows_name(task.schema.name)] = pack([rows[place] for place in places])
    if tensors:
        save_file(tensors, folder / METHOD_TENSORS_FILE)


def score(base: BaseModel, tasks: Mapping[str, Task], folder: Path, wanted: Sequence[tuple[str, str]]) -> None:
    """Let a version answer the wanted tasks and parts that it has not answered. Each is stored when it is done."""
    missing = [(name, part) for name, part in wanted if not (folder / "scores" / f"{name}-{part}.json").is_file()]
    if not missing:
        return
    with adapter_on(base.model, folder) as model:
        for name, part in missing:
            task, started = tasks[name], time.perf_counter()
            rows = task.part(part)
            log_probs_NL, targets_N = label_scores(
                model,
                base.tokenizer,
                task.schema,
                rows,
                max_prompt_tokens=TrainConfig(max_prompt_tokens=160).max_prompt_tokens,
            )
            half_NL = log_probs_NL.clip(min=-6e4).astype("<f2")
            write_json(
                folder / "scores" / f"{name}-{part}.json",
                {
                    "rows": digest_of([*rows]),
                    "hits": "".join(map(str, (log_probs_NL.argmax(1) == targets_N).astype(int))),
                    "targets": targets_N.tolist(),
                    "log_probs": base64.b64encode(half_NL.tobytes()).decode(),
                    "seconds": time.perf_counter() - started,
                },
            )


def wanted_in_the_end(last: str) -> list[tuple[str, str]]:
    """Tasks and parts that the last version answers: the rows of all judged tasks, and development rows of its own."""
    names = [*JUDGED, *([] if last in JUDGED else [last])]
    return [*((name, "dev") for name in names), *((name, "unused") for name in JUDGED)]


def finish(base: BaseModel, tasks: Mapping[str, Task], folder: Path, settings: Mapping[str, Any], out: Path) -> None:
    """Score the last version of a chain or a fork, and write the cell."""
    versions = versions_of(folder)
    last = json.loads((versions[-1] / VERSION_FILE).read_text())["task"]
    for name, part in wanted_in_the_end(last):
        score(base, tasks, versions[-1], [(name, part)])
    if not (perplexities := versions[-1] / "perplexity.json").is_file():
        with adapter_on(base.model, versions[-1]) as model:
            adapted = perplexity(model, base.tokenizer)
        write_json(perplexities, {"base": perplexity(base.model, base.tokenizer), "adapted": adapted})
    write_cell(folder, settings, out)


def write_cell(folder: Path, settings: Mapping[str, Any], out: Path) -> None:
    """Write what is known of a chain or a fork as one file."""
    versions = []
    for version in versions_of(folder):
        facts = json.loads((version / VERSION_FILE).read_text())
        scores = {path.stem: json.loads(path.read_text()) for path in sorted((version / "scores").glob("*.json"))}
        versions.append({**facts, "stores": load_method_state(version).stores, "scores": scores})
    perplexities = versions_of(folder)[-1] / "perplexity.json"
    cell = {
        "settings": settings,
        "versions": versions,
        "perplexity": json.loads(perplexities.read_text()) if perplexities.is_file() else None,
    }
    write_json(out / f"{folder.name}.json", cell)


def versions_of(folder: Path) -> list[Path]:
    """The folders of the complete versions of a chain or a fork, first to last."""
    return sorted(path.parent for path in folder.glob(f"*/{VERSION_FILE}"))


def write_json(path: Path, value: Any) -> None:
    """Write JSON in one step."""
    with complete_file(path) as part:
        part.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def digest_of(value: Any) -> str:
    """Sixteen hexadecimal digits over JSON values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def commit() -> str:
    """The commit of the code that runs."""
    here = Path(benchmarks.__file__).parent
    return subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True).stdout.strip()


Data = Annotated[Path, typer.Option(help="Folder of the tasks.")]
Work = Annotated[Path, typer.Option(help="Folder of the versions; a second call goes on with them.")]
Cells = Annotated[Path, typer.Option(help="Folder of the cells.")]
ArmName = Annotated[str, typer.Option(help=f"One of {', '.join(ARMS)}.")]
Kept = Annotated[int, typer.Option(help="Kept rows of a task; 0: none.")]
WORK = Path("memory-work")


@app.command()
def chain(
    data: Data,
    arm: ArmName,
    kept: Kept,
    order: Annotated[str, typer.Option(help="Order of the tasks, 1 or 2.")] = "1",
    seed: Annotated[int, typer.Option(help="Seed of the chain.")] = 102,
    work: Work = WORK,
    out: Cells = CELLS,
) -> None:
    """Learn the nine tasks one after another, and keep and score every version."""
    disable_progress_bars()
    tasks, base, names = read_tasks(data), cached_base(identify_base(DEFAULT_BASE)), ORDERS[order]
    folder = work / f"chain-{order}-{seed}-{arm}-{kept}"
    settings = {"design": "chain", "order": order, "seed": seed, "arm": arm, "kept": kept, "parent": None}
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock", timeout=0):
        write_json(folder / "settings.json", settings)
        for number, name in enumerate(names):
            version = Version(tasks=names[: number + 1], arm=arm, kept=kept, seed=seed)
            learn(base, tasks, version, folder / str(number - 1) if number else None, folder / str(number))
            score(base, tasks, folder / str(number), [(name, "dev")])
            typer.echo(f"{folder.name}: {name} is learned")
            write_cell(folder, settings, out)
        finish(base, tasks, folder, settings, out)


@app.command()
def fork(
    data: Data,
    chain: Annotated[str, typer.Option(help="Name of the chain, such as chain-1-102-deal-10.")],
    arm: ArmName,
    kept: Kept,
    seed: Annotated[int | None, typer.Option(help="Seed of the last training.", show_default="the chain's")] = None,
    work: Work = WORK,
    out: Cells = CELLS,
) -> None:
    """Learn the last task of a chain again, from the version before it."""
    disable_progress_bars()
    parent = json.loads((work / chain / "settings.json").read_text())
    tasks, base, names = read_tasks(data), cached_base(identify_base(DEFAULT_BASE)), ORDERS[parent["order"]]
    seed = parent["seed"] if seed is None else seed
    folder = work / f"fork-{parent['order']}-{seed}-{arm}-{kept}-of-{parent['seed']}-{parent['arm']}-{parent['kept']}"
    settings = {**parent, "design": "fork", "seed": seed, "arm": arm, "kept": kept, "parent": parent}
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock", timeout=0):
        write_json(folder / "settings.json", settings)
        last, start = len(names) - 1, folder / "parent"
        give_kept_rows(base, tasks, work / chain / str(last - 1), names[:-1], kept, parent["seed"], start)
        learn(base, tasks, Version(tasks=names, arm=arm, kept=kept, seed=seed), start, folder / str(last))
        typer.echo(f"{folder.name}: {names[-1]} is learned")
        finish(base, tasks, folder, settings, out)


@dataclass(frozen=True, kw_only=True)
class Figures:
    """The figures of one cell, means over the judged tasks, in percent where nothing else is said.

    Attributes:
        num_rows: Scored rows.
        learned: Accuracy on development rows right after a task was learned; None for a fork.
        newest: Accuracy in the end on the judged task that was learned last.
        tb: In nats.
    """

    num_rows: int
    learned: float | None
    end: float
    recentred: float
    tb: float
    newest: float
    perplexity: float | None
    by_task: Mapping[str, float]


def figures_of(cell: Mapping[str, Any], parts: Sequence[str] = ("dev", "unused")) -> Figures | None:
    """Return the figures of a cell on some parts of the rows; None if its last version has not answered them all."""
    last, order = cell["versions"][-1], ORDERS[cell["settings"]["order"]]
    if last["task"] != order[-1] or not all(f"{name}-{part}" in last["scores"] for name in JUDGED for part in parts):
        return None
    answers = {name: [unpack(last["scores"][f"{name}-{part}"]) for part in parts] for name in JUDGED}
    by_task, recentred, tb, num_rows = {}, [], [], 0
    for name, of_task in answers.items():
        log_probs_NL, targets_N = (np.concatenate(side) for side in zip(*of_task, strict=True))
        hits = "".join(last["scores"][f"{name}-{part}"]["hits"] for part in parts)
        by_task[name], num_rows = 100 * hits.count("1") / len(hits), num_rows + len(hits)
        recentred.append(100 * float(recentred_hits(log_probs_NL, targets_N).mean()))
        tb.append(tempered_nll(log_probs_NL, targets_N))
    learned = [
        100 * fmean(map(int, version["scores"][f"{version['task']}-dev"]["hits"]))
        for version in cell["versions"]
        if version["task"] in JUDGED
    ]
    perplexities = cell["perplexity"]
    return Figures(
        num_rows=num_rows,
        learned=fmean(learned) if len(learned) == len(JUDGED) else None,
        end=fmean(by_task.values()),
        recentred=fmean(recentred),
        tb=fmean(tb),
        newest=by_task[next(name for name in reversed(order) if name in JUDGED)],
        perplexity=perplexities and perplexities["adapted"] / perplexities["base"],
        by_task=by_task,
    )


def unpack(score: Mapping[str, Any]) -> tuple[Floats, Any]:
    """The log-probabilities of the labels (N, L), and the number of each row's right label (N)."""
    flat = np.frombuffer(base64.b64decode(score["log_probs"]), "<f2").astype(np.float64)
    return flat.reshape(len(score["targets"]), -1), np.array(score["targets"])


def tempered_nll(log_probs_NL: Floats, targets_N: Any) -> float:
    """The negative log-likelihood of the right labels after a temperature and a bias per label, in nats.

    Both are fitted on the other half of the rows. A small pull of the biases to 0 keeps a label finite that the half
    lacks.
    """
    halves_N, losses = np.arange(len(targets_N)) % 2, []
    num_labels = log_probs_NL.shape[1]

    def mean_loss(values: Floats, half: int) -> float:
        scores_nL = log_probs_NL[halves_N == half] * np.exp(values[0]) + values[1:]
        return -float(log_softmax(scores_nL, axis=1)[np.arange(len(scores_nL)), targets_N[halves_N == half]].mean())

    for half in (0, 1):
        size = int((halves_N != half).sum())

        def goal(values: Floats, half: int = half, size: int = size) -> float:
            return mean_loss(values, 1 - half) + float((values[1:] ** 2).sum()) / (2 * size)

        fitted = minimize(goal, np.zeros(1 + num_labels), method="L-BFGS-B").x
        losses.append(mean_loss(fitted, half))
    return fmean(losses)


def kind_of_processor(cell: Mapping[str, Any]) -> str:
    """What decides the rounding of a cell."""
    machine = cell["versions"][-1]["machine"]
    return f"{machine['cpu']} {' '.join(machine['bf16_instructions'])}".strip()


def read_cells(folder: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the names and the contents of the cells that `chain` and `fork` wrote."""
    for path in sorted([*folder.glob("chain-*.json"), *folder.glob("fork-*.json")]):
        yield path.stem, json.loads(path.read_text())


@app.command(name="score")
def score_command(
    data: Annotated[Path | None, typer.Option(help="Folder of the tasks, to score what is not scored.")] = None,
    work: Annotated[Path | None, typer.Option(help="Folder of the versions, to score what is not scored.")] = None,
    part: Annotated[list[str] | None, typer.Option(help="Parts of the rows.", show_default="dev, unused")] = None,
    out: Cells = CELLS,
) -> None:
    """Print the figures of every cell; first score what is trained and not scored, if folders are given."""
    if data is not None and work is not None:
        disable_progress_bars()
        tasks, base = read_tasks(data), cached_base(identify_base(DEFAULT_BASE))
        for path in sorted(work.glob("*/settings.json")):
            settings, trained = json.loads(path.read_text()), versions_of(path.parent)
            if trained and trained[-1].name == str(len(ORDERS[settings["order"]]) - 1):
                finish(base, tasks, path.parent, settings, out)
    table = Table(title="Judged tasks, mean in %", title_justify="left")
    for column in (
        "cell",
        "rows",
        "learned",
        "end",
        "re-centred",
        "TB",
        "newest",
        "perplexity",
        "minutes",
        "processor",
    ):
        table.add_column(column, justify="left" if column in ("cell", "processor") else "right")
    for name, cell in read_cells(out):
        if (figures := figures_of(cell, part or ("dev", "unused"))) is not None:
            table.add_row(
                name,
                str(figures.num_rows),
                f"{figures.learned:.1f}" if figures.learned is not None else "–",
                f"{figures.end:.1f}",
                f"{figures.recentred:.1f}",
                f"{figures.tb:.3f}",
                f"{figures.newest:.1f}",
                f"{figures.perplexity:.2f}" if figures.perplexity is not None else "–",
                f"{sum(version['seconds'] for version in cell['versions']) / 60:.0f}",
                kind_of_processor(cell),
            )
    Console(width=160).print(table)


@dataclass(frozen=True, kw_only=True)
class Point:
    """The cells of one arm that learned the last task from one parent, with one number of kept rows.

    Attributes:
        parent: The arm of the chain that made the parent.
        figures: Of every cell, by seed.
    """

    parent: str
    arm: str
    kept: int
    figures: Sequence[Figures]

    def mean(self, name: str) -> float:
        """The mean of one figure over the cells."""
        return fmean(getattr(figures, name) for figures in self.figures)


def points_of(cells: Iterator[tuple[str, Mapping[str, Any]]]) -> list[Point]:
    """Return the forks by parent, arm and number of kept rows. A chain that has forks is a fork of its own parent."""
    of_cells = [cell for _, cell in cells]
    parents = [cell["settings"]["parent"] for cell in of_cells]
    points: dict[tuple[str, str, int], list[Figures]] = {}
    for cell in of_cells:
        settings = cell["settings"]
        is_shown = settings["design"] == "fork" or settings in parents
        if is_shown and (figures := figures_of(cell)) is not None:
            parent = (settings["parent"] or settings)["arm"]
            points.setdefault((parent, settings["arm"], settings["kept"]), []).append(figures)
    return [Point(parent=key[0], arm=key[1], kept=key[2], figures=points[key]) for key in sorted(points)]


def kept_figure(points: Sequence[Point], parent: str) -> Figure:
    """Accuracy in the end over the number of kept rows, one line an arm and one dot a cell."""
    figure, shown = new_figure(7.0, 3.6), [point for point in points if point.parent == parent]
    axes = figure.subplots()
    numbers = sorted({point.kept for point in shown})
    for arm, colour, marker in zip(sorted({point.arm for point in shown}), COLOURS, MARKERS, strict=False):
        of_arm = [point for point in shown if point.arm == arm]
        axes.plot(
            [numbers.index(point.kept) for point in of_arm],
            [point.mean("end") for point in of_arm],
            color=colour,
            linewidth=1.8,
            marker=marker,
            label=arm,
        )
        for point in of_arm:
            ends = [figures.end for figures in point.figures]
            axes.plot([numbers.index(point.kept)] * len(ends), ends, marker, color=colour, markersize=4, alpha=0.5)
    tidy(axes)
    axes.set_xticks(range(len(numbers)), [str(number) for number in numbers])
    axes.set_xlabel("kept rows of each old task", color=MUTED)
    axes.set_ylabel("accuracy in the end, %", color=MUTED)
    axes.legend(frameon=False)
    return figure


def free_text(folder: Path) -> list[dict[str, Any]]:
    """Return the figures of the cells with free answers, best first.

    Scores are the mean ROUGE-L of LIFTED in percent, right after learning and in the end. Retraining has no first one.
    """

    def mean_of(scores: Sequence[Mapping[str, Any]]) -> float:
        return 100 * fmean(fmean(map(float, score["correct"])) for score in scores)

    cells = []
    for path in sorted(folder.glob("*.json")):
        cell = json.loads(path.read_text())
        versions, perplexities = cell["versions"], cell["perplexity"]
        learned = [version["scores"][version["task"]] for version in versions if version["task"] in LIFTED]
        cells.append(
            {
                "arm": cell["settings"]["strategy"],
                "seed": cell["settings"]["seed"],
                "learned": mean_of(learned) if learned else None,
                "end": mean_of([versions[-1]["scores"][name] for name in LIFTED]),
                "perplexity": perplexities["adapted"] / perplexities["base"],
            }
        )
    return sorted(cells, key=lambda cell: -cell["end"])


@app.command()
def page(out: Cells = CELLS) -> None:
    """Write the page and its picture from the cells."""
    points = points_of(read_cells(out))
    chains = {
        (
            cell["settings"]["order"],
            cell["settings"]["seed"],
            cell["settings"]["arm"],
            cell["settings"]["kept"],
        ): figures
        for _, cell in read_cells(out)
        if cell["settings"]["design"] == "chain" and (figures := figures_of(cell)) is not None
    }
    content = (
        templates()
        .get_template(f"{PAGE.name}.j2")
        .render(points=points, chains=chains, rows=NUM_ROWS, free_text=free_text(FREE_TEXT))
    )
    PAGE.write_text(content, encoding="utf-8")
    save_png(kept_figure(points, "deal"), PICTURE)


if __name__ == "__main__":
    app()
