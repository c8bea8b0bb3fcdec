"""Does the interval beside a score of few test rows hold the score on a thousand unused ones?

    python -m benchmarks.test_rows run --data CL_BENCHMARK
    python -m benchmarks.test_rows table

run: chains of versions of the built-in base model learn one task, an arrival of 120 rows and two of 80. Half of the
labels of the last one are wrong. Every version, and the base model, answers a pool of rows that no version has learned.
The answers are stored, one file a chain; a second call goes on.

table: for every version, test rows are drawn from the pool many times. The interval of their score is compared with the
score on 1,000 other rows of the pool. The gate judges each draw as it would judge the version in a lineage, so the
promoted versions are counted alone too: a gate prefers lucky draws.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from numpy.typing import NDArray

from benchmarks.output import RESULTS, Out, describe_machine, read, write_result
from deal_core.evaluation.accuracy_matrix import AccuracyMatrix
from deal_core.evaluation.gate import decide
from deal_core.evaluation.interval import wilson_interval
from deal_core.evaluation.report import EvaluationReport
from deal_core.judging_config import GateConfig
from deal_core.regular_file import complete_file

Ints = NDArray[np.int64]
ANSWERS = RESULTS / "test_rows"
ARRIVALS = ((120, 0.0), (80, 0.0), (80, 0.5))
"""Rows of each arrival, and the share of them with a wrong label."""
SIZES = (20, 30, 60, 100)
"""Test rows of a draw."""
NUM_UNUSED = 1000

app = typer.Typer(help=__doc__, rich_markup_mode=None)


class Case(NamedTuple):
    """A task of CL_Benchmark."""

    instruction: str
    labels: Mapping[str, str]
    """Label in the file → label of the task; other rows are left out."""


TOPIC = "What is the topic of the following paragraph? Choose one from the option."
SENTIMENT = "What is the sentiment of the following paragraph? Choose one from the option."
DBPEDIA = ("Artist", "Written Work", "Mean of Transportation", "Plant", "Natural Place", "Village", "Animal", "Company")
DBPEDIA += ("Office Holder", "Film", "Building", "Album", "Educational Institution", "Athlete")
CASES = {
    "SST-2": Case(SENTIMENT, {"Good": "Good", "Bad": "Bad"}),
    "agnews": Case(TOPIC, {label: label for label in ("World", "Sports", "Business", "Science or Technology")}),
    "dbpedia": Case(TOPIC, {label: label for label in DBPEDIA}),
}


@app.command()
def run(
    data: Annotated[Path, typer.Option(help="Folder that benchmarks/cl_benchmark.py writes.")],
    seeds: Annotated[int, typer.Option(help="Chains of each task.")] = 1,
    epochs: Annotated[int, typer.Option(help="Passes over the rows.")] = 2,
    longest: Annotated[int, typer.Option(help="Tokens of a prompt, at most.")] = 96,
    threads: Annotated[int | None, typer.Option(help="Threads of torch.", show_default="all cores")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the answers.")] = ANSWERS,
) -> None:
    """Train the chains that are missing, and store their answers."""
    import torch
    from datasets import Dataset

    from benchmarks.champions import champion_of
    from deal_core.adapter.state import adapter_on
    from deal_core.base_model.load import load_base
    from deal_core.base_model.sources import DEFAULT_BASE
    from deal_core.data.schema import label_key
    from deal_core.evaluation.evaluate import evaluate_task
    from deal_core.training.train import train_adapter
    from infra.settings import HomeSettings

    if threads is not None:
        torch.set_num_threads(threads)
    base = load_base(DEFAULT_BASE, HomeSettings().cache_dir)
    out.mkdir(parents=True, exist_ok=True)
    for seed in range(seeds):
        for name, case in CASES.items():
            file = out / f"{name}-{seed}.json"
            if file.is_file():
                continue
            labels = tuple(dict.fromkeys(case.labels.values()))
            numbers = {label_key(label): number for number, label in enumerate(labels)}
            rows, generator = _rows_of(data / name, case, seed), random.Random(seed)
            num_learned = sum(number for number, _ in ARRIVALS)
            pool = Dataset.from_list(rows[num_learned : num_learned + NUM_UNUSED + max(SIZES)])
            setup, asked = champion_of(name, labels, case.instruction, epochs=epochs, longest=longest, seed=seed)
            answers: list[list[int]] = []
            parent: Path | None = None
            with TemporaryDirectory() as work:
                for version, (number, share) in enumerate(((0, 0.0), *ARRIVALS)):  # first the base model
                    if version:
                        landed, rows = rows[:number], rows[number:]
                        wrong = set(generator.sample(range(number), round(share * number)))
                        learned = [
                            {**row, "output": generator.choice([each for each in labels if each != row["output"]])}
                            if place in wrong
                            else row
                            for place, row in enumerate(landed)
                        ]
                        adapter = Path(work) / str(version)
                        train_adapter(
                            base,
                            Dataset.from_list(learned),
                            setup,
                            parent_folder=parent,
                            output_folder=adapter,
                            checkpoint_folder=Path(work) / f"checkpoints-{version}",
                        )
                        parent = adapter
                    with adapter_on(base.model, parent) as model:
                        found = evaluate_task(model, base.tokenizer, asked, pool)
                    answers.append([numbers.get(label_key(text), -1) for text in found.answers])
                    typer.echo(f"{file.stem}, version {version}: {100 * found.accuracy:.1f} %")
            result = {
                "case": name,
                "seed": seed,
                "labels": len(labels),
                "right": [numbers[label_key(output)] for output in pool["output"]],
                "answers": answers,
                "machine": describe_machine(),
            }
            with complete_file(file) as part:
                part.write_text(json.dumps(result) + "\n")


def _rows_of(file: Path, case: Case, seed: int) -> list[dict[str, str]]:
    """The rows of a task, training and test rows together, each text once, in an order of this seed."""
    found: dict[str, str] = {}
    for part in ("train", "test"):
        for line in file.with_name(f"{file.name}.{part}.jsonl").read_text().splitlines():
            row = json.loads(line)
            if row["label"] in case.labels:
                found.setdefault(row["text"], case.labels[row["label"]])
    rows = [{"input": text, "output": label} for text, label in found.items()]
    random.Random(seed).shuffle(rows)
    return rows


class Outcome(NamedTuple):
    """One draw of test rows of one version."""

    num_test: int
    version: int
    is_promoted: bool
    holds: bool


def outcomes(stored: Mapping[str, Any], num_draws: int, generator: np.random.Generator) -> list[Outcome]:
    """Draw test rows for every version of a chain, judge the version by them, and compare with 1,000 others."""
    right_N, answers_VN = np.array(stored["right"]), np.array(stored["answers"])
    hits_VN = (answers_VN == right_N).astype(float)
    found = []
    for num_test in SIZES:
        for version in range(1, len(hits_VN)):
            for _ in range(num_draws):
                places = generator.permutation(len(right_N))
                test, unused = places[:num_test], places[num_test : num_test + NUM_UNUSED]
                score, truth = hits_VN[version, test].mean(), hits_VN[version, unused].mean()
                low, high = wilson_interval(float(score), num_test)
                is_promoted = _passes(hits_VN[:, test], version, float(np.bincount(right_N[test]).max() / num_test))
                found.append(Outcome(num_test, version, is_promoted, bool(low <= truth <= high)))
    return found


def _passes(hits_VN: NDArray[np.float64], version: int, majority_rate: float) -> bool:
    """Whether the gate passes a version of one task, on these rows."""
    base, now = float(hits_VN[0].mean()), float(hits_VN[version].mean())
    before = float(hits_VN[version - 1].mean()) if version > 1 else None
    report = EvaluationReport(
        task="task",
        accuracies={"task": now},
        parent_accuracies={} if before is None else {"task": before},
        base_accuracy=base,
        parent_accuracy_new_task=before,
        num_rows={"task": hits_VN.shape[1]},
        matrix=AccuracyMatrix(),
        outcomes={"task": tuple(hits_VN[version])},
        parent_outcomes={} if before is None else {"task": tuple(hits_VN[version - 1])},
        majority_rate=majority_rate,
    )
    return decide(report, GateConfig()).accepted


@app.command()
def table(
    folder: Annotated[Path, typer.Option(help="Folder of the answers.")] = ANSWERS,
    draws: Annotated[int, typer.Option(help="Draws of test rows, for each version and number of rows.")] = 1000,
    out: Out = RESULTS / "test_rows.json",
) -> None:
    """Print how often the interval holds the score on 1,000 unused rows, for all versions and for promoted ones."""
    files = sorted(folder.glob("*.json"))
    if not files:
        raise typer.BadParameter(f"{folder} has no answers; run `python -m benchmarks.test_rows run` first.")
    generator = np.random.default_rng(0)
    found = [outcome for file in files for outcome in outcomes(read(file), draws, generator)]
    lines = []
    typer.echo(f"{len(files)} chains of {len(ARRIVALS)} versions, {draws} draws of test rows for each version")
    typer.echo("test rows   of all versions   of promoted ones   promoted")
    for num_test in SIZES:
        of_size = [each for each in found if each.num_test == num_test]
        promoted = [each for each in of_size if each.is_promoted]
        line = {
            "num_test": num_test,
            "held": round(100 * float(np.mean([each.holds for each in of_size])), 1),
            "held_promoted": round(100 * float(np.mean([each.holds for each in promoted])), 1) if promoted else None,
            "promoted": round(100 * len(promoted) / len(of_size), 1),
        }
        lines.append(line)
        held_promoted = "–" if line["held_promoted"] is None else f"{line['held_promoted']} %"
        typer.echo(f"{num_test:9d}   {line['held']:13.1f} %   {held_promoted:>16}   {line['promoted']:6.1f} %")
    write_result(out, {"chains": len(files), "draws": draws, "sizes": lines})


if __name__ == "__main__":
    app()
