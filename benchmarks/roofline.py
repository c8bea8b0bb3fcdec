"""Time on paper: arithmetic, bytes moved and what bounds a step, from a model's sizes and a device's published figures.

Nothing here is measured. LoRA's base weights are frozen, so the backward pass has gradients of activations but none of
weights: four operations per weight and token in all, where full training has six.
"""

from __future__ import annotations

from dataclasses import dataclass

from deal_core.planning.memory import BYTES_OF, FP32, BatchShape, ModelSize


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
        return max(self.compute, self.memory, self.link)

    @property
    def bound(self) -> str:
        """What bounds it."""
        return max(("compute", self.compute), ("memory", self.memory), ("link", self.link), key=lambda pair: pair[1])[0]


METHOD_PASSES = 30
"""Reads and writes of as many numbers as the adapter has, by which DEAL's own step is counted: gradients taken back,
penalty, clip, AdamW, factors written."""


def row_flops(model: ModelSize, batch: BatchShape, *, rank: int, checkpointing: bool) -> float:
    """Operations of one row, forward and backward.

    Args:
        model: The base model's sizes; of a mixture of experts all experts count, though a token meets few.
        batch: For the tokens of a row (T) and of its answer (K).
        rank: Of the adapter.
        checkpointing: Whether the layers' forward pass is made twice.
    """
    tokens, answer = batch.num_tokens, batch.num_answer_tokens
    linear = 2 * model.parameters["linear layers"] * tokens
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
    """Add up a step: the batch, then the rehearsed questions, which go through the model by themselves.

    Args:
        model: The base model's sizes.
        batch: One micro-batch of one device.
        kept_bytes: What autograd keeps of it.
        rank: Of the adapter.
        precision: Of the frozen weights.
        checkpointing: Whether the layers' forward pass is made twice.
        rehearsed: Questions about old tasks beside the batch.
        num_devices: Over which batches, and with sharding the weights, are spread.
        is_sharded: Whether each device holds its share of the weights alone and gathers a layer's when it needs them.
    """
    rows, passes = batch.num_rows + rehearsed, (3 if checkpointing else 2) * (2 if rehearsed else 1)
    weights = model.num_parameters * BYTES_OF[precision]
    factors = FP32 * sum(model.num_factor_numbers(rank))
    others = (num_devices - 1) / num_devices
    return StepCost(
        flops=rows * row_flops(model, batch, rank=rank, checkpointing=checkpointing),
        memory_bytes=passes * weights + 2 * kept_bytes * rows / batch.num_rows + METHOD_PASSES * factors,
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
