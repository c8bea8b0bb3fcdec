"""Suggest changes to a spec whose run does not fit its device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from deal_core.config import TrainConfig
from deal_core.planning.memory import MemoryPlan

MIN_PROMPT_TOKENS = 64
MemoryOf = Callable[[TrainConfig, str], MemoryPlan]
"""The plan of a run with other training settings and another precision of the frozen weights."""


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """A change, and the run's memory with it.

    Attributes:
        change: Keys and values in the form of a spec.
        total_bytes: Total of the plan with the change.
        fits: Whether the total is within the limit.
    """

    change: str
    total_bytes: int
    fits: bool


def find_remedies(memory_of: MemoryOf, train: TrainConfig, precision: str, limit: int) -> tuple[Remedy, ...]:
    """Return single changes that save memory, and at the end all of them together.

    With a smaller batch, gradient accumulation is raised, so that a step still learns from as many rows.

    Args:
        memory_of: Computes a plan.
        train: The settings that do not fit.
        precision: Precision of the frozen weights.
        limit: Most bytes that the plan may take.
    """
    found: list[tuple[str, TrainConfig, str]] = []
    if not train.gradient_checkpointing:
        found.append(("train.gradient_checkpointing: true", replace(train, gradient_checkpointing=True), precision))
    smaller = train
    while smaller.batch_size > 1:
        smaller = _with_batch(train, smaller.batch_size // 2)
        change = f"train.batch_size: {smaller.batch_size} with gradient_accumulation_steps: " \
                 f"{smaller.gradient_accumulation_steps}"  # fmt: skip
        if memory_of(smaller, precision).total <= limit or smaller.batch_size == 1:
            found.append((change, smaller, precision))
            break
    shorter = train
    while shorter.max_prompt_tokens >= 2 * MIN_PROMPT_TOKENS:
        shorter = replace(shorter, max_prompt_tokens=shorter.max_prompt_tokens // 2)
        is_last = shorter.max_prompt_tokens < 2 * MIN_PROMPT_TOKENS
        if memory_of(shorter, precision).total <= limit or is_last:
            found.append((f"train.max_prompt_tokens: {shorter.max_prompt_tokens}", shorter, precision))
            break
    if precision == "fp32":
        found.append(("weights in bf16, on a device that computes in it", train, "bf16"))
    if train.quantize != "4bit":
        change = "train.quantize: 4bit, on a CUDA device with bitsandbytes"
        found.append((change, replace(train, quantize="4bit"), precision))
    if len(found) > 1:
        everything = replace(
            smaller, gradient_checkpointing=True, max_prompt_tokens=shorter.max_prompt_tokens, quantize="4bit"
        )
        found.append(("all of these together", everything, "bf16"))
    before = memory_of(train, precision).total
    totals = [memory_of(changed, each_precision).total for _, changed, each_precision in found]
    return tuple(
        Remedy(change=change, total_bytes=total, fits=total <= limit)
        for (change, _, _), total in zip(found, totals, strict=True)
        if total < before  # for example, a lower limit of prompts saves nothing if the rows are short
    )


def _with_batch(train: TrainConfig, size: int) -> TrainConfig:
    rows = train.batch_size * train.gradient_accumulation_steps
    return replace(train, batch_size=size, gradient_accumulation_steps=-(-rows // size))
