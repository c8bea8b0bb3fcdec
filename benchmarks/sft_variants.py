"""One training of `benchmarks.sft_trainer`, by this project's trainer or by TRL's, and the loss of what it left.

Every variant continues the same parent adapter on the same rows: the second task of a lineage, so that DEAL's core and
rehearsal have something to hold. Of TRL's settings all that decide the result are this project's: rate (constant),
batch size, epochs, clip, seed, and the base's own precision without autocast (SFTConfig would turn bf16 autocast on).
Its rows are prompt and completion, TRL's own format for a question and its answer, so that the answer's tokens alone
are learned on both sides. Attention is PyTorch's on TRL's side, as transformers gives it. Where there is no Triton, so
on a CPU, SFTTrainer takes the output layer of every position, in tiles; only the loss leaves the others out.
Neither side writes checkpoints.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from peft import PeftModel
from transformers.trainer_callback import PrinterCallback

from deal_core.adapter.state import adapter_on
from deal_core.base_model.load import BaseModel, load_base
from deal_core.benchmark.suites import Rows
from deal_core.config import AdapterConfig, TrainConfig
from deal_core.data.collate import AnswerCollator, answer_loss, encode_rows
from deal_core.data.prompts import render_prompt
from deal_core.data.schema import TaskSchema
from deal_core.method_config import MethodConfig
from deal_core.training.train import TrainingSetup, train_adapter
from infra.settings import HomeSettings

OURS = {"deal": "deal", "seq_lora": "seq_lora"}
"""Variant to strategy; seq_lora is plain LoRA, which a lineage's first task is with any strategy."""
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
VARIANTS = (*OURS, *TRL)
HELD_OUT_BATCH = 8


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


def make_parent(setup: Setup) -> dict[str, Any]:
    """Learn the first task; return the precision of the base, and the loss on the second task's held-out rows."""
    disable_progress_bars()
    base = load_base(setup.base, HomeSettings().cache_dir)
    train_adapter(
        base, Dataset.from_list(list(setup.first_rows)),
        TrainingSetup(
            task=setup.first,
            strategy="deal",
            adapter=setup.adapter,
            method=MethodConfig(),
            train=setup.train,
        ),
        parent_folder=None,
        output_folder=setup.parent,
        checkpoint_folder=setup.parent / "checkpoints",
    )
    return {
        "precision": str(base.model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "held_out_loss_before": held_out_loss(base, setup.parent, setup),
    }


def measure(variant: str, setup: Setup, seed: int, folder: Path) -> dict[str, Any]:
    """Train one variant in this process, and return what it took and what it learned."""
    disable_progress_bars()
    setup = replace(setup, train=replace(setup.train, seed=seed))
    base = load_base(setup.base, HomeSettings().cache_dir)
    found = train_with_trl(variant, base, setup, folder) if variant in TRL else train_here(variant, base, setup, folder)
    return {
        "seed": seed,
        **found,
        "rows_per_second": len(setup.rows) * setup.train.num_epochs / found["seconds"],
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "held_out_loss": held_out_loss(load_base(setup.base, HomeSettings().cache_dir), folder, setup),
    }


def train_here(variant: str, base: BaseModel, setup: Setup, folder: Path) -> dict[str, Any]:
    """Train with this project's trainer. Timed: all between rows in memory and the adapter on disk."""
    rows = Dataset.from_list(list(setup.rows))
    started = time.perf_counter()
    result = train_adapter(
        base, rows,
        TrainingSetup(
            task=setup.task,
            strategy=OURS[variant],
            adapter=setup.adapter,
            method=MethodConfig(),
            train=setup.train,
            old_tasks=(setup.first,),
        ),
        parent_folder=setup.parent,
        output_folder=folder,
        checkpoint_folder=folder / "checkpoints",
    )
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "loop_seconds": result.seconds, "num_steps": result.num_steps}


def train_with_trl(variant: str, base: BaseModel, setup: Setup, folder: Path) -> dict[str, Any]:
    """Train with SFTTrainer. Timed: the adapter's loading, tokenising in the trainer's constructor, and train()."""
    from trl import SFTConfig, SFTTrainer

    base.model.set_attn_implementation("sdpa")
    rows = Dataset.from_list(
        [
            {
                "prompt": "".join(render_prompt(setup.task, row["input"], base.tokenizer)),
                "completion": f" {row['output']}",
            }
            for row in setup.rows
        ]
    )
    started = time.perf_counter()
    model = PeftModel.from_pretrained(base.model, str(setup.parent), is_trainable=True)
    args = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=setup.train.batch_size,
        num_train_epochs=setup.train.num_epochs,
        learning_rate=setup.train.learning_rate,
        lr_scheduler_type="constant",
        max_grad_norm=setup.train.max_grad_norm,
        seed=setup.train.seed,
        bf16=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **TRL[variant],
    )
    trainer = SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=base.tokenizer)
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
    encoded = encode_rows(
        Dataset.from_list(list(setup.held_out)), base.tokenizer, setup.task,
        max_prompt_tokens=setup.train.max_prompt_tokens, max_answer_tokens=setup.train.max_answer_tokens,
    )  # fmt: skip
    collate = AnswerCollator(base.tokenizer, is_seq2seq=False)
    rows = sorted(encoded, key=lambda row: int(row["length"]))
    total = 0.0
    with adapter_on(base.model, adapter) as model:
        for start in range(0, len(rows), HELD_OUT_BATCH):
            batch = collate(rows[start : start + HELD_OUT_BATCH])
            total += float(answer_loss(model, {name: tensor.to(base.model.device) for name, tensor in batch.items()}))
    return total / sum(len(row["answer_ids"]) for row in rows)
