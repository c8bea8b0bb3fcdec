"""Training rows per second of this project's trainer and of TRL's SFTTrainer with PEFT, on the same rows.

    pip install --editable '.[benchmarks]'
    python -m benchmarks.speed.sft_trainer
    python -m benchmarks.speed.sft_trainer --instruction-tokens 500 --rows 8 --measurements 2 --out FILE

The second command gives all rows one long instruction, as a system prompt is. FILE is sft_long_prompt.json.
This project's trainer reads the instruction once a step. SFTTrainer reads it with every row, also where it packs rows
into one sequence.

Every variant continues the same parent adapter on the same rows: the second task of a lineage, so that DEAL's core and
rehearsal have something to hold. Base, rows, adapter, precision, batch size, rate, epochs, clip, steps and seed are the
same. SFTConfig would turn bf16 autocast on, which is left off. TRL's rows are prompt and completion, so that only the
answer's tokens are learned on both sides. Its attention is PyTorch's, as transformers gives it. Where there is no
Triton, so on a CPU, SFTTrainer computes the output layer of every position, in tiles; only the loss leaves the others
out. Neither side writes checkpoints.

The variants take turns in random order, every measurement in a process of its own. Tokenising and training are timed on
both sides, loading the base model is not. Whether they learned the same is the mean cross-entropy of the answers'
tokens on held-out rows, by the same code for all. Each measurement has its own seed.
"""

from __future__ import annotations

import importlib.metadata
import random
import statistics
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from datasets import Dataset, disable_progress_bars
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback

from benchmarks.continual.paired import paired_interval
from benchmarks.continual.suites import Rows, SuiteTask, load_suite
from benchmarks.method.versions import train_into
from benchmarks.output import RESULTS, Out, alone, peak_bytes, write_result
from benchmarks.tiny_base import EXAMPLES
from deal_core.adapter.state import adapter_on
from deal_core.base_model.load import BaseModel, load_base
from deal_core.base_model.sources import DEFAULT_BASE, resolve_base
from deal_core.config import AdapterConfig, TrainConfig
from deal_core.data.collate import AnswerCollator, answer_loss, encode_rows
from deal_core.data.prompts import render_prompt
from deal_core.data.reading.readers import read_rows
from deal_core.data.schema import TaskSchema
from deal_core.errors import DealError
from deal_core.method_config import MethodConfig
from deal_core.training.train import TrainingSetup
from infra.settings import HomeSettings

OURS = ("deal", "seq_lora")
"""Strategies; seq_lora is plain LoRA, which a lineage's first task is with any strategy."""
TRL: dict[str, dict[str, Any]] = {
    "trl_defaults": {},
    "trl_no_checkpointing": {"gradient_checkpointing": False},
    "trl_tuned": {
        "gradient_checkpointing": False,
        "completion_only_loss": True,
        "train_sampling_strategy": "group_by_length",
    },
    "trl_padding_free": {"gradient_checkpointing": False, "padding_free": True, "max_length": None},
}
"""Variant to what departs from SFTConfig's defaults: they recompute activations, and take rows as they come. Without
padding a batch is one long row, which TRL recommends with FlashAttention alone; on a CPU it trains the same."""
PACKING = "trl_packing"
"""Rows one after another in sequences as long as a padded batch, one of them a step: the other variants have rows."""
VARIANTS = (*OURS, *TRL, PACKING)
REFERENCE = "trl_defaults"
HELD_OUT_BATCH = 8
UNCUT = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What all variants share.

    Attributes:
        base: The base model, as `load_base` takes it.
        first: The task that the parent adapter learned.
        first_rows: Its rows, columns input and output.
        task: The task that is learned.
        rows: Its rows; none is longer than either trainer takes.
        held_out: Rows of it on which the loss is measured.
        adapter: Shape of the adapter.
        train: How long and how fast.
        parent: Folder of the parent adapter.
    """

    base: str
    first: TaskSchema
    first_rows: Rows
    task: TaskSchema
    rows: Rows
    held_out: Rows
    adapter: AdapterConfig
    train: TrainConfig
    parent: Path

    def load_base(self) -> BaseModel:
        """Load the base model anew."""
        return load_base(self.base, HomeSettings().cache_dir)


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
    return encode_rows(Dataset.from_list(list(rows)), tokenizer, task, max_prompt_tokens=UNCUT, max_answer_tokens=UNCUT)


def lengthen(task: TaskSchema, tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> TaskSchema:
    """Return the task with its instruction repeated until it has as many tokens; 0 leaves it as it is."""
    instruction = task.instruction
    while len(tokenizer.encode(instruction)) < num_tokens:
        instruction += f" {task.instruction}"
    return replace(task, instruction=instruction)


def fitting(
    rows: Rows, task: TaskSchema, tokenizer: PreTrainedTokenizerBase, train: TrainConfig, limit: int | None
) -> Rows:
    """Return the first rows that no trainer cuts: what is cut, and where, would not be the same."""
    kept = []
    for row, tokens in zip(rows, encode(rows, task, tokenizer), strict=True):
        fits = len(tokens["prompt_ids"]) <= train.max_prompt_tokens
        if fits and len(tokens["answer_ids"]) <= train.answer_tokens(task.labels):
            kept.append(row)
    if not kept:
        raise typer.BadParameter(f"No row of {task.name} is within {train.max_prompt_tokens} tokens.")
    return tuple(kept[:limit])


def make_parent(setup: Setup) -> dict[str, Any]:
    """Learn the first task; return the precision of the base, and the loss on the second task's held-out rows."""
    disable_progress_bars()
    base = setup.load_base()
    learning = TrainingSetup(
        task=setup.first, strategy="deal", adapter=setup.adapter, method=MethodConfig(), train=setup.train
    )
    train_into(setup.parent, base, Dataset.from_list(list(setup.first_rows)), learning)
    return {
        "precision": str(base.model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "held_out_loss_before": held_out_loss(base, setup.parent, setup),
    }


def measure(variant: str, setup: Setup, seed: int, folder: Path) -> dict[str, Any]:
    """Train one variant in this process, and return what it took and what it learned."""
    disable_progress_bars()
    setup = replace(setup, train=replace(setup.train, seed=seed))
    train = train_here if variant in OURS else train_with_trl
    found = train(variant, setup.load_base(), setup, folder)
    return {
        "seed": seed,
        **found,
        "rows_per_second": len(setup.rows) * setup.train.num_epochs / found["seconds"],
        "peak_memory_mib": peak_bytes() / 2**20,
        "held_out_loss": held_out_loss(setup.load_base(), folder, setup),
    }


def train_here(strategy: str, base: BaseModel, setup: Setup, folder: Path) -> dict[str, Any]:
    """Train with this project's trainer. Timed: all between rows in memory and the adapter on disk."""
    rows = Dataset.from_list(list(setup.rows))
    learning = TrainingSetup(
        task=setup.task,
        strategy=strategy,
        adapter=setup.adapter,
        method=MethodConfig(),
        train=setup.train,
        old_tasks=(setup.first,),
    )
    started = time.perf_counter()
    result = train_into(folder, base, rows, learning, setup.parent)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "loop_seconds": result.seconds, "num_steps": result.num_steps}


def train_with_trl(variant: str, base: BaseModel, setup: Setup, folder: Path) -> dict[str, Any]:
    """Train with SFTTrainer. Timed: the adapter's loading, tokenising in the trainer's constructor, and train()."""
    from trl import SFTConfig, SFTTrainer

    base.model.set_attn_implementation("sdpa")
    rows = [
        {"prompt": render_prompt(setup.task, row["input"], base.tokenizer), "completion": f" {row['output']}"}
        for row in setup.rows
    ]
    longest = max(encode(setup.rows, setup.task, base.tokenizer)["length"])
    packing = {"packing": True, "max_length": setup.train.batch_size * longest, "gradient_checkpointing": False}
    args = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=1 if variant == PACKING else setup.train.batch_size,
        num_train_epochs=setup.train.num_epochs,
        learning_rate=setup.train.rate(base.model.num_parameters()),
        lr_scheduler_type="constant",
        max_grad_norm=setup.train.max_grad_norm,
        seed=setup.train.seed,
        bf16=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **(packing if variant == PACKING else TRL[variant]),
    )
    dataset = Dataset.from_list(rows)
    started = time.perf_counter()
    model = PeftModel.from_pretrained(base.model, str(setup.parent), is_trainable=True)
    trainer = SFTTrainer(model=model, args=args, train_dataset=dataset, processing_class=base.tokenizer)
    trainer.remove_callback(PrinterCallback)
    constructed = time.perf_counter()
    trainer.train()
    ended = time.perf_counter()
    model.save_pretrained(str(folder), save_embedding_layers=False)  # "auto" would ask the Hub for the base
    return {
        "seconds": ended - started,
        "loop_seconds": ended - constructed,
        "num_steps": trainer.state.global_step,
        **count_tokens(trainer.train_dataset["input_ids"], trainer.train_dataset["labels"]),
    }


def count_tokens(sequences: Iterable[list[int]], labels: Iterable[list[int]]) -> dict[str, int]:
    """Tokens of the rows, and those of them that are learned."""
    return {
        "num_tokens": sum(map(len, sequences)),
        "num_answer_tokens": sum(token >= 0 for row in labels for token in row),
    }


@torch.no_grad()
def held_out_loss(base: BaseModel, adapter: Path, setup: Setup) -> float:
    """Mean cross-entropy of the answers' tokens over the held-out rows; the one measure of every variant."""
    encoded = encode(setup.held_out, setup.task, base.tokenizer)
    collate = AnswerCollator(base.tokenizer, is_seq2seq=False)
    rows = sorted(encoded, key=lambda row: int(row["length"]))
    total = 0.0
    with adapter_on(base.model, adapter) as model:
        for start in range(0, len(rows), HELD_OUT_BATCH):
            batch = collate(rows[start : start + HELD_OUT_BATCH])
            total += float(answer_loss(model, {name: tensor.to(base.model.device) for name, tensor in batch.items()}))
    return total / sum(len(row["answer_ids"]) for row in rows)


def compare(runs: list[dict[str, Any]], reference: list[dict[str, Any]]) -> dict[str, Any]:
    """A variant's figures, and beside the reference's of the same rounds."""
    ratios = [run["rows_per_second"] / other["rows_per_second"] for run, other in zip(runs, reference, strict=True)]
    speed = paired_interval(ratios, [0.0] * len(ratios))
    losses = [run["held_out_loss"] for run in runs]
    loss = paired_interval(losses, [run["held_out_loss"] for run in reference])
    medians = ("rows_per_second", "seconds", "loop_seconds", "peak_memory_mib", "held_out_loss")
    return {
        "num_measurements": len(runs),
        **{f"median_{name}": statistics.median(run[name] for run in runs) for name in medians},
        f"median_of_paired_ratios_to_{REFERENCE}": statistics.median(ratios),
        "mean_of_paired_ratios_ci95": [speed.mean, speed.low, speed.high],
        "range_of_held_out_loss": [min(losses), max(losses)],
        f"mean_held_out_loss_minus_{REFERENCE}_ci95": [loss.mean, loss.low, loss.high],
    }


def require_same_work(runs: dict[str, list[dict[str, Any]]], expected: dict[str, int]) -> None:
    """End where a variant took other steps, or learned from other tokens: it is not the same work that was timed."""
    for count, value in expected.items():
        found = {
            name: [run.get(count, value) for run in measured]
            for name, measured in runs.items()
            if not (name == PACKING and count == "num_steps")
        }
        if any(set(counts) != {value} for counts in found.values()):
            typer.echo(f"{count} should be {value} in every measurement: {found}", err=True)
            raise typer.Exit(1)


def main(
    base: Annotated[str, typer.Option(help="Base model, a causal one.")] = DEFAULT_BASE,
    data: Annotated[
        Path | None, typer.Option(help="Folder of tasks as for `benchmarks.compare`.", show_default="the examples")
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
    instruction_tokens: Annotated[
        int, typer.Option(help="Tokens that the learned task's instruction has at least; 0: as it is.", min=0)
    ] = 0,
    out: Out = RESULTS / "sft_trainer.json",
) -> None:
    """Print and write rows per second of every variant, its ratio to SFTTrainer at its defaults, and the losses."""
    version = find_trl()
    disable_progress_bars()
    names = (first, task)
    try:
        tasks = {name: example_task(name) for name in names} if data is None else load_suite(data, names)
        tokenizer = AutoTokenizer.from_pretrained(resolve_base(base, HomeSettings().cache_dir))
        train = TrainConfig(
            schedule="constant",
            balance_labels=False,
            checkpoint_steps=0,
            batch_size=batch_size,
            num_epochs=epochs,
            learning_rate=learning_rate,
            max_prompt_tokens=max_prompt_tokens + instruction_tokens,
        )
        adapter = AdapterConfig(rank=rank)
    except DealError as error:
        raise typer.BadParameter(str(error)) from None
    schema = lengthen(tasks[task].schema, tokenizer, instruction_tokens)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory(prefix="deal-sft-") as work:
        setup = Setup(
            base=base,
            first=tasks[first].schema,
            task=schema,
            adapter=adapter,
            train=train,
            first_rows=fitting(tasks[first].train, tasks[first].schema, tokenizer, train, rows),
            rows=fitting(tasks[task].train, schema, tokenizer, train, rows),
            held_out=fitting(tasks[task].test, schema, tokenizer, train, test_rows),
            parent=Path(work) / "parent",
        )
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
    write_result(
        out,
        {
            "base": base,
            "tasks": names,
            "num_rows": len(setup.rows),
            "num_held_out_rows": len(setup.held_out),
            "tokens_per_row": {"min": min(lengths), "median": statistics.median(lengths), "max": max(lengths)},
            "batch_size": batch_size,
            "epochs": epochs,
            "learning_rate": learning_rate,
            "rank": rank,
            "instruction_tokens": instruction_tokens,
            **work_done,
            **before,
            "trl": version,
            "variants": {name: compare(found, runs[REFERENCE]) for name, found in runs.items()},
            "measurements": runs,
        },
    )


if __name__ == "__main__":
    typer.run(main)
