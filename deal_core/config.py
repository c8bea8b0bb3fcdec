"""Settings of adapter, training, data and evaluation: frozen dataclasses, checked when they are made.

Each field declares its limits, so a spec, Python and a server's parameter form all apply the same ones. This module
does not import torch, so the command line reads a spec without it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import asdict, replace
from typing import Annotated, Any, Literal

from pydantic import Field

from deal_core.errors import ConfigError
from deal_core.limits import (
    AtLeastZero,
    Count,
    CountOrZero,
    Flag,
    Positive,
    Seed,
    Share,
    ShareBelowOne,
    require,
    settings,
)
from deal_core.safe_text import brief

MAX_RANK = 2**14
"""Hardly a base model has layers with more dimensions, which a rank cannot exceed."""
RSLORA_ALPHA = 8.0
"""α of rsLoRA, which does not follow the rank. At the default rank both kinds of LoRA then have the scale 2."""


@settings("adapter")
class AdapterConfig:
    """Shape of a lineage's LoRA adapter. All versions of the lineage share it."""

    rank: Annotated[Count, Field(ge=2, le=MAX_RANK)] = 16
    """r: number of columns of B and rows of A."""
    alpha: Positive | None = None
    """Scale α of ΔW = (α/r)·B·A, or (α/√r)·B·A with rslora; None means 2·rank, or 8 with rslora."""
    rslora: Flag = False
    """Whether the scale is α/√r in place of α/r (rsLoRA, arXiv 2312.03732): a larger rank then learns as fast."""
    target_modules: tuple[str, ...] | Literal["all-linear"] | None = None
    """Names of the linear layers that carry the adapter, or all-linear for all but the output layer; None means the
    model type's query and value projections where they are known, else all-linear."""
    dropout: ShareBelowOne = 0.0
    """Share of the adapter's inputs that are set to zero in training."""

    @property
    def scale_alpha(self) -> float:
        """α, or its default if alpha is None."""
        default = RSLORA_ALPHA if self.rslora else 2.0 * self.rank
        return default if self.alpha is None else self.alpha

    @property
    def scale(self) -> float:
        """The factor of B·A in ΔW."""
        return self.scale_alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


RATES = ((1e9, 1e-3), (4e9, 5e-4))
"""Most parameters of a base model → its rate. The first was measured on 135M parameters; LoRA on 7B parameters usually
takes 1e-4 to 2e-4."""
LARGEST_RATE = 2e-4
"""Rate of all larger base models."""
Quantize = Literal["none", "8bit", "4bit"]
Shard = Literal["none", "base"]
"""base: each process keeps a part of the frozen base model, none: each keeps the whole."""
Schedule = Literal["constant", "linear"]
Attention = Literal["auto", "eager", "sdpa", "flash_attention_2"]
FLASH_ATTENTION = "flash_attention_2"
MIN_VALIDATED = 200
"""Training rows from which on some are held back for validation."""
NOT_DECIDING = ("num_processes", "attention", "padding_free", "torch_compile")
"""Settings of the training that change its result by no more than rounding, or by other random numbers of a dropout."""


@settings("train")
class TrainConfig:
    """How one task is learned. All strategies use these settings."""

    learning_rate: Positive | None = None
    """Rate of AdamW at the first step. None: by the size of the base model, 0.001 up to one billion parameters, 0.0005
    up to four billion, 0.0002 above."""
    warmup_share: ShareBelowOne = 0.0
    """Share of the steps in which the rate first rises from 0."""
    weight_decay: AtLeastZero = 0.0
    """AdamW's weight decay."""
    schedule: Schedule = "linear"
    """Course of the learning rate: it falls linearly to zero at the last step, or it stays constant."""
    num_epochs: Count = 3
    """Passes over the training rows. One pass over 150 rows is 19 steps, which are too few."""
    max_steps: Count | None = None
    """Optimiser steps; a value here replaces num_epochs."""
    validation_share: ShareBelowOne = 0.0
    """Share of an arrival's training rows that are not learned but decide which step of the training is kept, and
    whether it ends early. Of fewer than 200 rows none are held back."""
    batch_size: Count = 8
    """Rows per micro-batch, summed over all processes."""
    gradient_accumulation_steps: Count = 1
    """Micro-batches per optimiser step."""
    max_grad_norm: AtLeastZero = 1.0
    """Clip of the global gradient norm; 0 turns it off."""
    max_prompt_tokens: Annotated[Count, Field(ge=16)] = 512
    """The text of a longer prompt is cut at its end. The instruction is never cut."""
    max_answer_tokens: Count | None = None
    """A longer answer is cut at its end, in training, evaluation and serving. None: 50 for labels, 256 for others."""
    checkpoint_steps: CountOrZero = 25
    """Optimiser steps between checkpoints; 0 keeps none."""
    gradient_checkpointing: Flag = False
    """Recompute activations in the backward pass: less memory, more time."""
    balance_labels: Flag = True
    """Give every batch the labels in the shares that they have among all rows. Free answers count as labels if each of
    them stands in four rows on average."""
    preference_beta: Positive = 0.1
    """β of the loss of preferences (DPO): with a larger one the model stays nearer to its parent version."""
    preference_learning_rate: Positive = 3e-4
    """In place of learning_rate for tasks that learn preferences: at 1e-3 the model forgets plain English."""
    seed: Seed = 0
    """Seed of the adapter's initialisation and of the order of rows."""
    num_processes: Count = 1
    """Processes that share every micro-batch, one per device. The result differs only by rounding."""
    quantize: Quantize = "none"
    """Precision of the frozen base model's linear layers: 8bit and 4bit (NF4) need CUDA and bitsandbytes."""
    attention: Attention = "auto"
    """How the training computes attention. auto: PyTorch's fused one, on a CPU with a faster backward pass.
    flash_attention_2 needs CUDA, bf16 and the package flash-attn."""
    padding_free: Flag = False
    """Put the rows of a batch behind one another instead of padding them to one length. It saves time with
    flash_attention_2 alone: the others compute the scores between rows too, and mask them."""
    torch_compile: Flag = False
    """Compile the model's layers before the first step. It takes minutes, and pays off in long trainings with CUDA."""

    def __post_init__(self) -> None:
        require(
            self.batch_size % self.num_processes == 0,
            f"train.batch_size is {self.batch_size}, which is no multiple of train.num_processes, "
            f"{self.num_processes}; give a multiple.",
        )
        require(
            not (self.torch_compile and self.gradient_checkpointing),
            "train.torch_compile compiles nothing of a layer that train.gradient_checkpointing recomputes; set one of "
            "them to false.",
        )

    def deciding(self) -> dict[str, Any]:
        """The settings that decide the result, for digests."""
        values = {name: value for name, value in asdict(self).items() if name not in NOT_DECIDING}
        if not self.validation_share:  # a digest from before this setting stays
            del values["validation_share"]
        return values

    def with_smaller_batches(self) -> TrainConfig | None:
        """Return settings whose micro-batches have half as many rows, and whose steps have the same rows as before.

        An odd number of rows is divided by its smallest factor. None: a process has one row of each micro-batch.
        """
        rows = self.batch_size // self.num_processes
        parts = next((number for number in range(2, rows + 1) if rows % number == 0), None)
        if parts is None:
            return None
        steps = self.gradient_accumulation_steps * parts
        return replace(self, batch_size=self.batch_size // parts, gradient_accumulation_steps=steps)

    def rate(self, num_parameters: int) -> float:
        """Return the rate at the first step, for a base model with so many parameters."""
        by_size = next((rate for size, rate in RATES if num_parameters <= size), LARGEST_RATE)
        return by_size if self.learning_rate is None else self.learning_rate

    def answer_tokens(self, labels: Collection[str]) -> int:
        """Return the most tokens of an answer to a task with these labels; without labels its answers are free."""
        return self.max_answer_tokens or (50 if labels else 256)

    def num_learned(self, num_rows: int) -> int:
        """Return how many of so many training rows are learned; the others are for validation."""
        return num_rows - (round(self.validation_share * num_rows) if num_rows >= MIN_VALIDATED else 0)

    @property
    def rows_per_step(self) -> int:
        """New rows of an optimiser step."""
        return self.batch_size * self.gradient_accumulation_steps

    def num_steps(self, num_rows: int) -> int:
        """Return the optimiser steps for so many training rows, of which some may be for validation."""
        return self.max_steps or math.ceil(self.num_learned(num_rows) / self.rows_per_step) * self.num_epochs


PREFERENCE = "preference"
"""The metric of tasks that learn preferences."""
METRICS = ("exact", "contains", "rouge_l", "json_fields", "loss", PREFERENCE)
"""The metrics of a task; `deal_core.evaluation.metrics` has their functions."""
MEASURED = ("loss", PREFERENCE)
"""Metrics that read the model's probabilities of given answers: nothing is generated."""
_OWN_METRIC = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def check_metric(metric: str) -> str:
    """Return a metric's name.

    Raises:
        ConfigError: It is neither a known metric nor of the form module:function.
    """
    if metric not in METRICS and not _OWN_METRIC.fullmatch(metric):
        raise ConfigError(
            f"task.metric is {brief(metric)}; use one of {', '.join(METRICS)}, or module:function for your own."
        )
    return metric


SUITES = ("arithmetic", "instructions", "json", "refusal", "tools")
"""The suites of general ability that ship with the project; `deal_core.general` has their rows."""
HARNESS = "lm_eval:"
"""What the name of a task of lm-evaluation-harness begins with in `evaluate.general`."""


@settings("evaluate")
class EvaluateConfig:
    """How a version is evaluated."""

    max_old_rows: Count = 5000
    """Most test rows of all earlier tasks together that a new version answers. A task's rows stay the same from version
    to version, or become fewer of the same rows, so versions are compared on common rows."""
    general: tuple[str, ...] = ()
    """Suites of general ability that every version answers: arithmetic, instructions, json, refusal, tools, and
    lm_eval:NAME for a task of lm-evaluation-harness."""
    min_general_accuracy: Share = 0.2
    """A suite on which the base model scores less, 0 to 1, is off: it has too little to lose. 0 leaves all on."""

    def __post_init__(self) -> None:
        for name in self.general:
            is_known = name in SUITES or (name.startswith(HARNESS) and len(name) > len(HARNESS))
            require(is_known, f"evaluate.general has {brief(name)}; give {', '.join(SUITES)} or {HARNESS}NAME.")
        require(len({*self.general}) == len(self.general), "evaluate.general names a suite twice; give each once.")


@settings("data")
class DataConfig:
    """Limits for a landed file, and the settings of its split."""

    test_share: Annotated[Positive, Field(lt=1)] = 0.2
    """Share of a first arrival's rows held out as test rows, chosen by hash: at least 30, or a third of fewer than 90
    rows. A split in the file replaces it."""
    test_rows: CountOrZero = 100
    """Test rows that a task aims at. Until it has them, each accepted version adds test_share of its new rows to those
    of its task. Test rows that the user chose stay as they are."""
    max_bad_share: Share = 0.2
    """A file with a larger share of bad rows is refused as a whole."""
    max_text_chars: Count = 20_000
    """A row with a longer input or output is a bad row."""
    retain_training_rows: Flag = False
    """Whether the store keeps training rows after they are learned. Test rows are always kept."""
    include_texts: Flag = False
    """Show the texts of rows in logs, reports, notices and MLflow. If False, rows appear there by number and digest.
    The default is False because deleting a row from the store does not delete copies of its text elsewhere."""
