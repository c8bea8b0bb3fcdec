"""Training rows per second of this project's trainer and of TRL's SFTTrainer with PEFT, on the same rows.

    pip install --editable '.[benchmarks]'
    python -m benchmarks.sft_trainer

Base, rows, adapter, precision, batch size, rate, epochs, steps and seed are the same; `benchmarks.sft_variants` says
what each variant does. The variants take turns in random order, every measurement in a process of its own. Tokenising
and training are timed on both sides, loading the base model is not. Whether they learned the same is the mean
cross-entropy of the answers' tokens on held-out rows, by the same code for all; each measurement has its own seed.
"""

from __future__ import annotations

import importlib.metadata
import random
import statistics
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from datasets import Dataset, disable_progress_bars
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.output import alone, write_result
from benchmarks.sft_variants import VARIANTS, Setup, count_tokens, make_parent, measure
from benchmarks.tiny_base import EXAMPLES
from deal_core.base_model.sources import DEFAULT_BASE, resolve_base
from deal_core.benchmark.suites import Rows, SuiteTask, load_suite
from deal_core.config import AdapterConfig, TrainConfig
from deal_core.data.collate import encode_rows
from deal_core.data.reading.readers import read_rows
from deal_core.data.schema import TaskSchema
from deal_core.errors import DealError
from deal_core.evaluation.metrics import paired_interval
from infra.settings import HomeSettings

REFERENCE = "trl_defaults"
UNCUT = 1_000_000


def find_trl() -> str:
    """Return the version of TRL that is installed, or end with what installs it."""
    try:
        return importlib.metadata.version("trl")
    except ModuleNotFoundError:
        typer.echo("TRL is not installed; in the checkout: pip install --editable '.[benchmarks]'", err=True)
        raise typer.Exit(1) from None


def example_task(name: str) -> SuiteTask:
    """One of the project's example domains, read as its spec says."""
    folder = EXAMPLES / name
    if not (folder / "spec.yaml").is_file():
        raise typer.BadParameter(f"{name} is none of the examples; take bank, clinic or parcels, or give --data.")
    spec = yaml.safe_load((folder / "spec.yaml").read_text(encoding="utf-8"))["task"]
    columns = {"text": "text", "label": "label", **spec.get("columns", {})}

    def rows(file: str, split: str) -> Rows:
        found = [row.values for row in read_rows(folder / file) if row.values.get("split", split) == split]
        return tuple({"input": each[columns["text"]], "output": each[columns["label"]]} for each in found)

    schema = TaskSchema(name=name, labels=tuple(spec["labels"]), instruction=spec["instruction"])
    train, test = rows(spec["data"], "train"), rows(spec.get("test_data", spec["data"]), "test")
    return SuiteTask(schema=schema, train=train, test=test)


def encode(rows: Rows, task: TaskSchema, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Tokenise rows without cutting any."""
    return encode_rows(
        Dataset.from_list(list(rows)), tokenizer, task, max_prompt_tokens=UNCUT, max_answer_tokens=UNCUT
    )


def fitting(
    rows: Rows, task: TaskSchema, tokenizer: PreTrainedTokenizerBase, train: TrainConfig, limit: int | None
) -> Rows:
    """Return the first rows that no trainer cuts: what is cut, and where, would not be the same."""
    kept = []
    for row, tokens in zip(rows, encode(rows, task, tokenizer), strict=True):
        fits = len(tokens["prompt_ids"]) <= train.max_prompt_tokens
        if fits and len(tokens["answer_ids"]) <= train.max_answer_tokens:
            kept.append(row)
    if not kept:
        raise typer.BadParameter(f"No row of {task.name} is within {train.max_prompt_tokens} tokens.")
    return tuple(kept[:limit])


def compare(runs: list[dict[str, Any]], reference: list[dict[str, Any]]) -> dict[str, Any]:
    """A variant's figures, and beside the reference's of the same rounds."""
    ratios = [run["rows_per_second"] / other["rows_per_second"] for run, other in zip(runs, reference, strict=True)]
    speed = paired_interval(ratios, [0.0] * len(ratios))
    loss = paired_interval([run["held_out_loss"] for run in runs], [run["held_out_loss"] for run in reference])
    medians = ("rows_per_second", "seconds", "loop_seconds", "peak_memory_mib", "held_out_loss")
    return {
        "num_measurements": len(runs),
        **{f"median_{name}": statistics.median(run[name] for run in runs) for name in medians},
        f"median_of_paired_ratios_to_{REFERENCE}": statistics.median(ratios),
        "mean_of_paired_ratios_ci95": [speed.mean, speed.low, speed.high],
        "range_of_held_out_loss": [f(run["held_out_loss"] for run in runs) for f in (min, max)],
        f"mean_held_out_loss_minus_{REFERENCE}_ci95": [loss.mean, loss.low, loss.high],
    }


def require_same_work(runs: dict[str, list[dict[str, Any]]], expected: dict[str, int]) -> None:
    """End where a variant took other steps, or learned from other tokens: it is not the same work that was timed."""
    for count, value in expected.items():
        found = {name: [run.get(count, value) for run in measured] for name, measured in runs.items()}
        if any(set(counts) != {value} for counts in found.values()):
            typer.echo(f"{count} should be {value} in every measurement: {found}", err=True)
            raise typer.Exit(1)


def main(
    base: Annotated[str, typer.Option(help="Base model, a causal one.")] = DEFAULT_BASE,
    data: Annotated[
        Path | None, typer.Option(help="Folder of tasks as for `deal benchmark`.", show_default="the examples")
    ] = None,
    first: Annotated[str, typer.Option(help="Task that the parent adapter has learned.")] = "bank",
    task: Annotated[str, typer.Option(help="Task that is learned.")] = "clinic",
    rows: Annotated[
        int | None, typer.Option(help="Training rows of each task, the first ones.", min=1, show_default="all")
    ] = None,
    test_rows: Annotated[int, typer.Option(help="Held-out rows at most.", min=1)] = 200,
    measurements: Annotated[int, typer.Option(help="Measurements of each variant, each of its own seed.", min=1)] = 5,
    batch_size: Annotated[int, typer.Option(help="Rows per step.")] = 8,
    epochs: Annotated[int, typer.Option(help="Passes over the rows.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="Rate of AdamW, constant.")] = 5e-4,
    rank: Annotated[int, typer.Option(help="Rank of the adapter.")] = 16,
    max_prompt_tokens: Annotated[int, typer.Option(help="Rows with longer prompts are left out.")] = 512,
    out: Annotated[Path, typer.Option(help="Where the figures go.")] = Path("benchmarks/results/sft_trainer.json"),
) -> None:
    """Print and write rows per second of every variant, its ratio to SFTTrainer at its defaults, and the losses."""
    version = find_trl()
    disable_progress_bars()
    try:
        names = (first, task)
        tasks = {name: example_task(name) for name in names} if data is None else load_suite(data, names)
        adapter = AdapterConfig(rank=rank)
        train = TrainConfig(
            schedule="constant", balance_labels=False,
            batch_size=batch_size, num_epochs=epochs, learning_rate=learning_rate, checkpoint_steps=0,
            max_prompt_tokens=max_prompt_tokens,
        )  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(resolve_base(base, HomeSettings().cache_dir))
    except DealError as error:
        raise typer.BadParameter(str(error)) from None
    schema = tasks[task].schema
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory(prefix="deal-sft-") as work:
        setup = Setup(
            base=base, first=tasks[first].schema, task=schema, adapter=adapter, train=train,
            first_rows=fitting(tasks[first].train, tasks[first].schema, tokenizer, train, rows),
            rows=fitting(tasks[task].train, schema, tokenizer, train, rows),
            held_out=fitting(tasks[task].test, schema, tokenizer, train, test_rows),
            parent=Path(work) / "parent",
        )  # fmt: skip
        before = alone(make_parent, setup)
        order = random.Random(0)
        for seed in range(measurements):
            for name in order.sample(VARIANTS, len(VARIANTS)):
                runs[name].append(alone(measure, name, setup, seed, Path(work) / f"{name}-{seed}"))
                typer.echo(f"{seed}, {name}: {runs[name][-1]['rows_per_second']:.2f} rows/s", err=True)
    encoded = encode(setup.rows, schema, tokenizer)
    work_done = {
        "num_steps": train.num_steps(len(setup.rows)),
        **count_tokens((row["prompt_ids"] + row["answer_ids"] for row in encoded), encoded["answer_ids"]),
    }
    require_same_work(runs, work_done)
    lengths = encoded["length"]
    write_result(out, {
        "base": base, "tasks": names, "num_rows": len(setup.rows), "num_held_out_rows": len(setup.held_out),
        "tokens_per_row": {"min": min(lengths), "median": statistics.median(lengths), "max": max(lengths)},
        "batch_size": batch_size, "epochs": epochs, "learning_rate": learning_rate, "rank": rank, **work_done, **before,
        "trl": version, "variants": {name: compare(found, runs[REFERENCE]) for name, found in runs.items()},
        "measurements": runs,
    })  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
