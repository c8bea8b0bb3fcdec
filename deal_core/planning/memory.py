"""What a run needs, worked out before it: memory by kind, from the sizes that a base model's config gives.

Pure: sizes in, bytes out. `deal_core.planning.meta_model` finds the sizes. The adapter and the method are fp32. The
frozen weights have the run's precision.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from deal_core.config import AdapterConfig, MethodConfig, Quantize, TrainConfig
from deal_core.data.prompts import encode_answer, encode_prompt
from deal_core.data.schema import TaskSchema
from deal_core.strategies import strategy_class
from deal_core.strategies.questions import tasks_to_ask

FP32 = 4
BYTES_OF = {"bf16": 2, "fp32": 4}
BITS_OF_QUANTIZED = {"8bit": 8.0, "4bit": 4.127}
"""Per weight of a linear layer; NF4 with its constants quantized too takes 0.127 more (QLoRA, arXiv 2305.14314)."""
SCORE_BYTES = 16
"""Per attention score, while a CPU takes one layer's backward pass; see `deal_core.base_model.cpu_attention`."""
MAX_SCORES = 2**26
"""Scores beyond which it takes the fused pass, which holds none."""
LOGIT_COPIES = 3
"""fp32 copies of the answers' logits that live at once in their backward pass."""
HEADROOM = 0.9
"""Share of a device's memory that a plan may fill; the rest is for the allocator and for what is not counted."""


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """A base model's sizes.

    Attributes:
        model_type: As its config calls it.
        parameters: How many numbers, by kind: "linear layers", "embeddings", "output layer", "norms and biases". An
            output layer tied to the embeddings counts among these.
        num_layers: L; of an encoder-decoder, pairs of layers.
        hidden_size: H.
        attention_size: Heads times their size.
        intermediate_size: Of the MLP.
        num_heads: Query heads.
        vocab_size: V.
        modules: (out features, in features) of every module that carries the adapter.
    """

    model_type: str
    parameters: Mapping[str, int]
    num_layers: int
    hidden_size: int
    attention_size: int
    intermediate_size: int
    num_heads: int
    vocab_size: int
    modules: tuple[tuple[int, int], ...]

    @property
    def num_parameters(self) -> int:
        """All of them."""
        return sum(self.parameters.values())

    def weight_bytes(self, precision: str, quantize: Quantize) -> int:
        """Bytes of the frozen weights; only the linear layers are quantized, the output layer is not."""
        linear = self.parameters["linear layers"]
        bits = BITS_OF_QUANTIZED.get(quantize, 8.0 * BYTES_OF[precision])
        return round(linear * bits / 8) + (self.num_parameters - linear) * BYTES_OF[precision]

    def num_factor_numbers(self, rank: int) -> tuple[int, int]:
        """Numbers in all A and in all B at this rank."""
        return rank * sum(num_in for _, num_in in self.modules), rank * sum(num_out for num_out, _ in self.modules)


@dataclass(frozen=True, kw_only=True)
class BatchShape:
    """The largest batch that goes through the model at once.

    Attributes:
        num_rows: B.
        num_tokens: T of the longest row, answer included.
        num_answer_tokens: K of the longest answer.
    """

    num_rows: int
    num_tokens: int
    num_answer_tokens: int


@dataclass(frozen=True, kw_only=True)
class ActivationSize:
    """Bytes that autograd keeps of one batch until its backward pass.

    Attributes:
        layer: Of each layer.
        rest: Of what is outside the layers: the answers' log-probabilities above all.
        boundary: Of a layer's input alone, which is what gradient checkpointing keeps.
    """

    layer: int
    rest: int
    boundary: int

    def kept(self, num_layers: int, *, checkpointing: bool) -> int:
        """All of it; with checkpointing every layer's input, and one layer made again."""
        if checkpointing:
            return num_layers * self.boundary + self.layer + self.rest
        return num_layers * self.layer + self.rest


NO_BATCH = BatchShape(num_rows=0, num_tokens=0, num_answer_tokens=0)
NO_ACTIVATIONS = ActivationSize(layer=0, rest=0, boundary=0)


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes on the device at the peak of a training step.

    Attributes:
        weights: The frozen base model.
        adapter: A and B, and what the method keeps beside them.
        optimiser: Gradients, and AdamW's two moments.
        activations: What autograd keeps between the passes.
        workspace: What one operation of the backward pass, or the decomposition of the parent's adapter, holds.
    """

    weights: int
    adapter: int
    optimiser: int
    activations: int
    workspace: int

    @property
    def certain(self) -> int:
        """What is there whatever the batch is."""
        return self.weights + self.adapter + self.optimiser

    @property
    def total(self) -> int:
        """All of it."""
        return self.certain + self.activations + self.workspace


@dataclass(frozen=True, kw_only=True)
class MethodShape:
    """What of a method decides its memory.

    Attributes:
        rank: Of the adapter.
        strategy: Name of the strategy. What O-LoRA, ELLA, EWC and LwF keep next to the adapter is not counted.
        method: Settings of the strategies.
        is_first_task: Whether the run starts from the base. Then every strategy trains A and B.
    """

    rank: int
    strategy: str
    method: MethodConfig
    is_first_task: bool


def plan_memory(
    model: ModelSize,
    activations: ActivationSize,
    batch: BatchShape,
    shape: MethodShape,
    *,
    train: TrainConfig,
    precision: str,
    on_cpu: bool,
) -> MemoryPlan:
    """Add up what a step needs.

    Args:
        model: The base model's sizes.
        activations: Of `batch`.
        batch: The largest one: rehearsed questions go through the model after the batch, so the larger of the two.
        shape: Of the method.
        train: For gradient checkpointing and quantized weights.
        precision: "bf16" or "fp32", of the frozen weights.
        on_cpu: Whether attention's backward pass is a CPU's.
    """
    adapter, optimiser, arrival = _method_bytes(model, shape)
    kept = activations.kept(model.num_layers, checkpointing=train.gradient_checkpointing)
    scores = batch.num_rows * model.num_heads * batch.num_tokens**2
    workspace = max(
        LOGIT_COPIES * FP32 * batch.num_rows * batch.num_answer_tokens * model.vocab_size,
        SCORE_BYTES * scores if on_cpu and scores <= MAX_SCORES else 0,
        3 * BYTES_OF[precision] * batch.num_rows * batch.num_tokens * model.intermediate_size,
        arrival - kept,  # before the first batch, so that the two are never there at once
    )
    return MemoryPlan(
        weights=model.weight_bytes(precision, train.quantize),
        adapter=adapter,
        optimiser=optimiser,
        activations=kept,
        workspace=workspace,
    )


def _method_bytes(model: ModelSize, shape: MethodShape) -> tuple[int, int, int]:
    """Bytes of the adapter and what the method keeps, of gradients and moments, and of the work when a task arrives."""
    num_A, num_B = model.num_factor_numbers(shape.rank)
    factors = num_A + num_B
    if shape.strategy != "deal" or shape.is_first_task:
        return FP32 * factors, FP32 * 3 * factors, 0
    deal = shape.method.deal
    parent = factors if deal.interpolation < 1 else 0
    if deal.core == "free":
        return FP32 * (factors + parent), FP32 * 3 * factors, 0
    guarded = num_A if deal.form == "spectral" and deal.project and deal.balanced else 0
    trained = num_A * (deal.sides != "B") + num_B * (deal.sides != "A")
    mixing = 2 * len(model.modules) * shape.rank**2 if deal.core == "soft" and deal.mixing else 0
    constants = factors + guarded + parent
    adapter = factors + constants + trained + mixing
    # gradients of A and B, then of what is trained, with two moments
    optimiser = factors + 3 * (trained + mixing)
    return FP32 * adapter, FP32 * optimiser, FP32 * 6 * factors


def largest_batch(train: TrainConfig, method: MethodConfig, *, num_old_tasks: int, strategy: str) -> int:
    """Rows that go through the model at once: the batch's or, after it, the rehearsed questions'."""
    return max(train.batch_size, rehearsed_rows(method, num_old_tasks=num_old_tasks, strategy=strategy))


def rehearsed_rows(method: MethodConfig, *, num_old_tasks: int, strategy: str) -> int:
    """Questions about old tasks at every optimiser step, beside the batch."""
    asks = (strategy == "deal" and method.rehearsal.texts != "none") or strategy in ("replay", "lwf")
    return method.rehearsal.rows_per_step if asks and num_old_tasks else 0


def adapter_rank(adapter: AdapterConfig, strategy: str, num_versions: int) -> int:
    """Rank of the adapter in training: some strategies widen it at every later task."""
    return adapter.rank + num_versions * strategy_class(strategy).num_new_slots(adapter)


NUM_LONGEST = 64
"""Rows that are tokenised: those with the most characters."""


def limits_of(train: TrainConfig, num_rows: int) -> BatchShape:
    """Return the largest batch that the settings allow."""
    return BatchShape(
        num_rows=num_rows, num_tokens=train.max_prompt_tokens + train.max_answer_tokens,
        num_answer_tokens=train.max_answer_tokens,
    )  # fmt: skip


def longest_of(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    task: TaskSchema,
    old_tasks: Sequence[TaskSchema],
    train: TrainConfig,
    num_rows: int,
) -> BatchShape:
    """Return a batch of the longest rows.

    Args:
        rows: Training rows, columns input and output.
        tokenizer: The base model's.
        task: How a row becomes a prompt.
        old_tasks: What the rows' texts are also asked about, while they are learned.
        train: Limits of prompts and answers.
        num_rows: Rows of the batch.

    Raises:
        ConfigError: A prompt is too long even without its text.
    """
    asked = tasks_to_ask(old_tasks, task)
    inputs = heapq.nlargest(NUM_LONGEST, rows["input"], key=len)
    outputs = heapq.nlargest(NUM_LONGEST, rows["output"], key=len)
    prompts = [len(encode_prompt(tokenizer, each, text, train.max_prompt_tokens))
               for each in (task, *asked) for text in inputs]  # fmt: skip
    answers = [len(encode_answer(tokenizer, task, text, train.max_answer_tokens)) for text in outputs]
    for old in asked:
        answers += [len(encode_answer(tokenizer, old, label, train.max_answer_tokens)) for label in old.labels]
        answers += [] if old.labels else [train.max_answer_tokens]
    return BatchShape(num_rows=num_rows, num_tokens=max(prompts) + max(answers), num_answer_tokens=max(answers))
