"""Write benchmarks/scaling.md: DEAL at 8B and 70B on paper. Nothing is measured, nothing is downloaded.

    python -m benchmarks.speed.scaling

Memory comes from the functions of `deal check --plan`. Time is worked out here, from a model's sizes and a device's
published figures: arithmetic, bytes moved, and what bounds a step. LoRA's base weights are frozen, so the backward pass
has gradients of activations but none of weights: four operations per weight and token in all, where full training has
six.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import LlamaConfig

from benchmarks.output import templates
from deal_core.config import AdapterConfig, TrainConfig
from deal_core.method_config import MethodConfig
from deal_core.planning.memory import (
    BYTES_OF,
    FP32,
    HEADROOM,
    BatchShape,
    MemoryPlan,
    MethodShape,
    ModelSize,
    plan_memory,
)
from deal_core.planning.meta_model import measure_model


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Published figures of one device, per second.

    Attributes:
        name: Of the device.
        flops: Dense operations in the weights' precision.
        memory_bandwidth: Bytes to and from its memory.
        link_bandwidth: Bytes to the other devices, in one direction.
        memory_bytes: Of its memory.
    """

    name: str
    flops: float
    memory_bandwidth: float
    link_bandwidth: float
    memory_bytes: int


H100 = Hardware(
    name="H100 SXM5 80 GB", flops=989.4e12, memory_bandwidth=3.35e12, link_bandwidth=450e9, memory_bytes=80 * 10**9
)
LLAMA = {"vocab_size": 128256, "num_key_value_heads": 8, "tie_word_embeddings": False}
MODELS = {
    "Llama-3.1-8B": LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, **LLAMA
    ),
    "Llama-3.1-70B": LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, **LLAMA
    ),
}
RANK, REHEARSED = 32, 4
UTILISATIONS = (0.2, 0.4)
METHOD_PASSES = 30
"""Reads and writes of as many numbers as the adapter has, by which DEAL's own step is counted: gradients taken back,
penalty, clip, AdamW, factors written."""
SETUPS = ((1, False, False), (1, False, True), (8, False, False), (8, False, True), (8, True, False), (8, True, True))
"""Devices, sharded, checkpointing."""
BATCH = BatchShape(num_rows=8, num_tokens=562, num_answer_tokens=50)
"""The defaults: 512 tokens of prompt and 50 of answer at most, eight rows. Rows of real data are shorter."""


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """One optimiser step of one micro-batch on one device.

    Attributes:
        flops: Floating-point operations, a multiplication and an addition counted as two.
        memory_bytes: To and from the device's memory, at the least: weights once a pass, activations written and read
            once, the method's own pass over its numbers.
        link_bytes: Sent by each device: gradients of the adapter, and weights where they are sharded.
    """

    flops: float
    memory_bytes: float
    link_bytes: float


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step, were each thing alone to bound it."""

    compute: float
    memory: float
    link: float

    @property
    def seconds(self) -> float:
        """The longest: the others go on beside it."""
        return max(vars(self).values())

    @property
    def bound(self) -> str:
        """What bounds it."""
        return max(vars(self).items(), key=lambda pair: pair[1])[0]


def row_flops(model: ModelSize, batch: BatchShape, *, rank: int, checkpointing: bool) -> float:
    """Operations of one row, forward and backward.

    Args:
        model: The base model's sizes; of a mixture of experts all experts count, though a token meets few.
        batch: For the tokens of a row (T) and of its answer (K).
        rank: Of the adapter.
        checkpointing: Whether the layers' forward pass is made twice.
    """
    tokens, answer = batch.num_tokens, batch.num_answer_tokens
    linear = 2 * (model.parameters["linear layers"] + model.parameters["other matrices"]) * tokens
    scores = 4 * model.num_layers * model.attention_size * tokens**2  # Q·Kᵀ and P·V; causality is not made use of
    head = 2 * model.vocab_size * model.hidden_size * answer
    adapter = 2 * sum(model.num_factor_numbers(rank)) * tokens
    forward = linear + scores + head + adapter
    # the backward pass of fused attention makes the scores again: five products for the forward pass's two
    backward = linear + 2.5 * scores + head + 2 * adapter
    return forward * (2 if checkpointing else 1) + backward


def step_cost(
    model: ModelSize,
    batch: BatchShape,
    kept_bytes: int,
    *,
    rank: int,
    precision: str,
    checkpointing: bool,
    rehearsed: int,
    num_devices: int,
    is_sharded: bool,
) -> StepCost:
    """Add up a step: the batch and the rehearsed rows, which go through the model together.

    Args:
        model: The base model's sizes.
        batch: One micro-batch of one device.
        kept_bytes: What autograd keeps of all rows.
        rank: Of the adapter.
        precision: Of the frozen weights.
        checkpointing: Whether the layers' forward pass is made twice.
        rehearsed: Questions about old tasks beside the batch.
        num_devices: Over which batches, and with sharding the weights, are spread.
        is_sharded: Whether each device holds its share of the weights alone and gathers a layer's when it needs them.
    """
    rows, passes = batch.num_rows + rehearsed, 3 if checkpointing else 2
    weights = model.num_parameters * BYTES_OF[precision]
    factors = FP32 * sum(model.num_factor_numbers(rank))
    others = (num_devices - 1) / num_devices
    return StepCost(
        flops=rows * row_flops(model, batch, rank=rank, checkpointing=checkpointing),
        memory_bytes=passes * weights + 2 * kept_bytes + METHOD_PASSES * factors,
        link_bytes=2 * others * factors + (passes * others * weights if is_sharded else 0),
    )


def step_time(cost: StepCost, hardware: Hardware, *, utilisation: float) -> StepTime:
    """Divide a step's cost by the device's figures.

    Args:
        cost: Of the step.
        hardware: Published figures.
        utilisation: Share of the device's operations that training reaches (MFU): an assumption.
    """
    return StepTime(
        compute=cost.flops / (utilisation * hardware.flops),
        memory=cost.memory_bytes / hardware.memory_bandwidth,
        link=cost.link_bytes / hardware.link_bandwidth,
    )


def describe(name: str, config: Any) -> dict[str, Any]:
    """A model's sizes and its lines of the table."""
    adapter = AdapterConfig(rank=RANK)
    model = measure_model(config, adapter)
    factors = model.num_factor_numbers(RANK)
    return {
        "name": name,
        "parameters": model.parameters,
        "num_parameters": model.num_parameters,
        "num_adapter": sum(factors),
        "modules": len(model.modules),
        "flops_row": row_flops(model, BATCH, rank=RANK, checkpointing=False),
        "flops_row_checkpointing": row_flops(model, BATCH, rank=RANK, checkpointing=True),
        "lines": [line(model, *setup) for setup in SETUPS],
    }


def memory_on_gpu(model: ModelSize, batch: BatchShape, *, rank: int, checkpointing: bool) -> MemoryPlan:
    """Memory of a step of a later task on one device, in bf16, with the rehearsed rows beside the batch."""
    batch = replace(batch, num_rows=batch.num_rows + REHEARSED)
    shape = MethodShape(rank=rank, strategy="deal", method=MethodConfig(), is_first_task=False)
    train = TrainConfig(gradient_checkpointing=checkpointing)
    return plan_memory(model, batch, shape, train=train, precision="bf16", on_cpu=False)


def line(model: ModelSize, devices: int, sharded: bool, checkpointing: bool) -> dict[str, Any]:
    """One setup: memory of each device, time of a step by what may bound it, rows per second."""
    memory = memory_on_gpu(model, BATCH, rank=RANK, checkpointing=checkpointing)
    total = memory.total - (memory.weights * (1 - 1 / devices) if sharded else 0)
    cost = step_cost(
        model,
        BATCH,
        memory.activations,
        rank=RANK,
        precision="bf16",
        checkpointing=checkpointing,
        rehearsed=REHEARSED,
        num_devices=devices,
        is_sharded=sharded,
    )
    times = [step_time(cost, H100, utilisation=share) for share in UTILISATIONS]
    return {
        "devices": devices,
        "sharded": sharded,
        "checkpointing": checkpointing,
        "memory": memory,
        "total": total,
        "fits": total <= HEADROOM * H100.memory_bytes,
        "cost": cost,
        "times": times,
        "rows_per_second": [devices * BATCH.num_rows / each.seconds for each in times],
    }


def main(page: Annotated[Path, typer.Option(help="Page to write.")] = Path("benchmarks/scaling.md")) -> None:
    """Fill the page."""
    models = [describe(name, config) for name, config in MODELS.items()]
    page.write_text(
        templates()
        .get_template("scaling.md.j2")
        .render(
            models=models,
            hardware=H100,
            batch=BATCH,
            rank=RANK,
            rehearsed=REHEARSED,
            utilisations=UTILISATIONS,
            headroom=HEADROOM,
        )
    )
    typer.echo(f"{page} written")


if __name__ == "__main__":
    typer.run(main)
