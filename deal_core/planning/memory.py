"""Plan a run's memory by kind, from the sizes in a base model's config, and suggest changes that save memory.

The functions are pure: sizes in, bytes out. `deal_core.planning.meta_model` finds the sizes. The adapter and the method
are fp32. The frozen weights have the run's precision.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from deal_core.base_model.cpu_attention import MAX_SCORES
from deal_core.config import AdapterConfig, Quantize, TrainConfig
from deal_core.data.prompts import encode_answer, encode_prompt
from deal_core.data.schema import REJECTED, TaskSchema
from deal_core.errors import ConfigError
from deal_core.method_config import MethodConfig
from deal_core.shown import Shown
from deal_core.strategies import strategy_class
from deal_core.strategies.old_tasks import longest_answer, tasks_to_ask
from deal_core.strategies.strategy import KeptSize, Strategy

FP32 = 4
BYTES_OF = {"bf16": 2, "fp32": 4}
BITS_OF_QUANTIZED = {"8bit": 8.0, "4bit": 4.127}
"""Bits per weight of a linear layer. NF4's constants, quantized too, take 0.127 bits (QLoRA, arXiv 2305.14314)."""
SCORE_BYTES = 16
"""Bytes per attention score in one layer's backward pass on a CPU; see `deal_core.base_model.cpu_attention`."""
LOGIT_COPIES = 3
"""Number of fp32 copies of the scored tokens' logits that exist at once in the backward pass."""
HEADROOM = 0.9
"""Share of a device's memory that a plan may fill; the rest is for the allocator and for uncounted memory."""
NUM_LONGEST = 64
"""Number of texts that become prompts: those with the most tokens."""
MAX_TOKENISED = 2_000
"""Most texts that are all tokenised to find the longest ones."""
MIN_PROMPT_TOKENS = 64


Part = Literal["row", "prompt", "answer"]
"""What a layer reads of a row. An encoder reads the prompt, and then the decoder reads the answer alone."""


@dataclass(frozen=True, kw_only=True)
class BatchShape:
    """The largest batch that goes through the model at once."""

    num_rows: int
    num_tokens: int
    """T of the longest row, including the answer."""
    num_answer_tokens: int
    """K of the longest answer."""

    def num_read(self, part: Part) -> int:
        """Number of tokens that a layer reads."""
        tokens = {"row": self.num_tokens, "answer": self.num_answer_tokens}
        return self.num_rows * tokens.get(part, self.num_tokens - self.num_answer_tokens)


@dataclass(frozen=True, kw_only=True)
class LayerSize:
    """How many numbers a layer keeps of each token that it reads, by what has them."""

    part: Part
    norms: int = 0
    """Inputs of the norms, which compute in fp32."""
    outputs: int = 0
    """Outputs of linear layers and activation, without what is added to the residual stream."""
    inputs: int = 0
    """Inputs of the modules with the adapter. Modules that read the same count once."""
    adapted_inputs: int = 0
    """The same, with each module counted: on a CPU each makes an fp32 copy of an input in bf16."""
    num_adapted: int = 0
    """Number of modules with the adapter; each keeps its R numbers between A and B."""
    num_attentions: int = 0


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """A base model's sizes."""

    model_type: str
    parameters: Mapping[str, int]
    """Number of parameters by kind: "linear layers", "other matrices" such as the experts of a mixture, "embeddings",
    "output layer", "norms and biases". An output layer that is tied to the embeddings counts as embeddings."""
    num_layers: int
    """L; of an encoder-decoder, pairs of layers."""
    hidden_size: int
    attention_size: int
    """Number of query heads times head size."""
    key_size: int
    """Number of heads of keys and values, times head size."""
    intermediate_size: int
    """Size of the MLP's hidden layer."""
    num_heads: int
    """Query heads; 0 if it has no attention."""
    vocab_size: int
    modules: tuple[tuple[int, int], ...]
    """(out features, in features) of every module that carries the adapter."""
    layers: tuple[LayerSize, ...]
    has_own_cpu_attention: bool
    """Whether `deal_core.base_model.cpu_attention` computes its attention on a CPU."""

    @property
    def num_parameters(self) -> int:
        """Number of parameters of all kinds."""
        return sum(self.parameters.values())

    def weight_bytes(self, precision: str, quantize: Quantize, num_shards: int = 1) -> int:
        """Bytes of the frozen weights on one device. Only the linear layers are quantized, not the output layer.

        Of several shards a device holds one, and two whole layers: one computes while the next is gathered. Embeddings
        and output layer are whole, and so is a quantized model.
        """
        linear = self.parameters["linear layers"]
        if quantize != "none":
            bits = BITS_OF_QUANTIZED[quantize]
            return round(linear * bits / 8) + (self.num_parameters - linear) * BYTES_OF[precision]
        whole = self.parameters["embeddings"] + self.parameters["output layer"]
        sharded = self.num_parameters - whole
        held = min(1.0, 1 / num_shards + 2 / self.num_layers) if num_shards > 1 else 1.0
        return (whole + round(sharded * held)) * BYTES_OF[precision]

    def num_factor_numbers(self, rank: int) -> tuple[int, int]:
        """Size of all A and of all B at this rank."""
        return rank * sum(num_in for _, num_in in self.modules), rank * sum(num_out for num_out, _ in self.modules)

    def activation_bytes(
        self, batch: BatchShape, rank: int, precision: str, *, on_cpu: bool, checkpointing: bool
    ) -> int:
        """Bytes that autograd keeps of one batch until its backward pass. Attention scores are not kept.

        PyTorch's fused attention keeps its output, and keys and values once per query head, because transformers
        repeats them if there is a mask. With checkpointing only every layer's input is kept, and all of one layer.

        Raises:
            ConfigError: The model has no attention. What its layers keep is not known.
        """
        if not self.num_heads:
            raise ConfigError(f"The activations of a {self.model_type}, which has no attention, cannot be planned.")
        width = BYTES_OF[precision]
        attention = self.attention_size
        if not (on_cpu and self.has_own_cpu_attention):
            attention += 2 * (self.attention_size - self.key_size)
        makes_copies = on_cpu and width < FP32
        layers = [
            batch.num_read(layer.part)
            * (
                FP32 * (layer.norms + rank * layer.num_adapted)
                + width * (layer.outputs + layer.num_attentions * attention)
                + (FP32 * layer.adapted_inputs if makes_copies else width * layer.inputs)
            )
            for layer in self.layers
        ]
        boundaries = self.num_layers * batch.num_rows * batch.num_tokens * width * self.hidden_size
        # outside the layers: logits and log-probabilities of the answers
        ends = 2 * FP32 * batch.num_rows * batch.num_answer_tokens * self.vocab_size
        return ends + (boundaries + max(layers) if checkpointing else sum(layers))


NO_BATCH = BatchShape(num_rows=0, num_tokens=0, num_answer_tokens=0)


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes on the device at the peak of a training step."""

    weights: int
    """The frozen base model."""
    adapter: int
    """A, B and further tensors of the method."""
    optimiser: int
    """Gradients, and AdamW's two moments."""
    activations: int
    """Tensors that autograd keeps between the passes."""
    workspace: int
    """Memory of the largest operation of the backward pass or of the parent adapter's decomposition."""

    @property
    def certain(self) -> int:
        """Bytes that do not depend on the batch."""
        return self.weights + self.adapter + self.optimiser

    @property
    def total(self) -> int:
        """Sum of all kinds."""
        return self.certain + self.activations + self.workspace


@dataclass(frozen=True, kw_only=True)
class MethodShape:
    """The facts of a method that decide its memory."""

    rank: int
    strategy: str
    method: MethodConfig
    is_first_task: bool
    """Whether the run starts from the base. Then every strategy trains A and B, and holds nothing else."""


def plan_memory(
    model: ModelSize,
    batch: BatchShape,
    shape: MethodShape,
    *,
    train: TrainConfig,
    precision: str,
    on_cpu: bool,
    num_shards: int = 1,
) -> MemoryPlan:
    """Add up the memory of a training step in one process.

    `batch` is that of `largest_batch`. `precision` is that of the frozen weights, which `num_shards` processes share.

    Raises:
        ConfigError: The activations of such a model cannot be planned.
    """
    learner = Strategy if shape.is_first_task else strategy_class(shape.strategy)
    numbers = learner.tensor_numbers(shape.method, model.modules, shape.rank)
    kept = 0
    if batch.num_rows:
        kept = model.activation_bytes(
            batch, shape.rank, precision, on_cpu=on_cpu, checkpointing=train.gradient_checkpointing
        )
    scores = batch.num_rows * model.num_heads * batch.num_tokens**2
    scores *= batch.num_rows if train.padding_free else 1  # those between the rows too
    workspace = max(
        LOGIT_COPIES * FP32 * batch.num_rows * batch.num_answer_tokens * model.vocab_size,
        SCORE_BYTES * scores if on_cpu and scores <= MAX_SCORES else 0,  # beyond: the fused pass, which holds none
        3 * BYTES_OF[precision] * batch.num_rows * batch.num_tokens * model.intermediate_size,
        FP32 * numbers.arrival - kept,  # used before the first batch, so never together with the activations
    )
    weights = model.weight_bytes(precision, train.quantize, num_shards)
    return MemoryPlan(
        weights=weights,
        adapter=FP32 * numbers.adapter,
        optimiser=FP32 * numbers.optimiser,
        activations=kept,
        workspace=workspace,
    )


def largest_batch(
    train: TrainConfig, *, rehearsed_per_step: int, on_cpu: bool, learns_preferences: bool = False
) -> int:
    """Most rows that go through the model at once: on a CPU the batch or, after it, the rehearsed rows of old tasks.

    An accelerator reads both at once. A row of preferences goes through the model twice: with its better and with its
    worse answer.
    """
    num_rows = 2 * train.batch_size if learns_preferences else train.batch_size
    return max(num_rows, rehearsed_per_step) if on_cpu else num_rows + rehearsed_per_step


def adapter_rank(adapter: AdapterConfig, strategy: str, num_versions: int) -> int:
    """Rank of the adapter in training: some strategies widen it at every later task."""
    return adapter.rank + num_versions * strategy_class(strategy).num_new_slots(adapter)


def longest_of(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    task: TaskSchema,
    old_tasks: Sequence[TaskSchema],
    train: TrainConfig,
    num_rows: int,
    kept: Mapping[str, KeptSize],
) -> BatchShape:
    """Return a batch of `num_rows` rows that are as long as the longest training row.

    Kept rows of the old tasks (`kept`, by task) are rehearsed with them. A task without kept rows is rehearsed on the
    rows' texts, so the prompts of its instruction count too.

    Raises:
        ConfigError: A prompt is too long even with an empty text.
    """
    old_to_ask = tasks_to_ask([old for old in old_tasks if old.name not in kept], task)
    texts = _longest(tokenizer, rows["input"])
    questions = [(schema, text, train.max_prompt_tokens) for schema in (task, *old_to_ask) for text in texts]
    prompts = [len(encode_prompt(tokenizer, *question)) for question in questions]
    num_prompt_tokens = max([*prompts, *(rows.longest_prompt for rows in kept.values())])

    outputs = [*rows["output"], *(rows[REJECTED.name] if task.learns_preferences else [])]
    answers = [
        len(encode_answer(tokenizer, task, text, train.answer_tokens(task.labels)))
        for text in _longest(tokenizer, outputs)
    ]
    for old in old_to_ask:
        limit = longest_answer(train, old)
        answers += [len(encode_answer(tokenizer, old, label, limit)) for label in old.labels] or [limit]
    answers += [rows.longest_answer for rows in kept.values()]
    return BatchShape(num_rows=num_rows, num_tokens=num_prompt_tokens + max(answers), num_answer_tokens=max(answers))


def _longest(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[str]:
    """The texts with the most tokens. Of many texts, only those with the most characters or bytes are tokenised."""
    some: Collection[str] = texts
    if len(texts) > MAX_TOKENISED:
        measures: tuple[Callable[[str], int], ...] = (
            len,
            lambda text: len(text.encode()),
            lambda text: len(text.encode()) - len(text),
        )
        some = {text for measure in measures for text in heapq.nlargest(NUM_LONGEST, texts, key=measure)}
    return heapq.nlargest(NUM_LONGEST, some, key=lambda text: len(tokenizer(text, verbose=False)["input_ids"]))


MemoryOf = Callable[[TrainConfig, str], MemoryPlan]
"""The plan of a run with other training settings and another precision of the frozen weights."""


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """A change, and the run's memory with it."""

    change: Annotated[str, Shown()]
    """Keys and values in the form of a spec."""
    total_bytes: Annotated[int, Shown("then takes", unit="bytes")]
    """Total of the plan with the change."""
    fits: Annotated[bool, Shown(words={True: "fits", False: "too much"}, is_state=True)]


def find_remedies(memory_of: MemoryOf, train: TrainConfig, precision: str, limit: int) -> tuple[Remedy, ...]:
    """Return single changes that save memory, and at the end all of them together.

    `train` and the precision of the frozen weights do not fit into `limit` bytes. With a smaller batch, gradient
    accumulation is raised, so that a step still learns from as many rows.
    """
    changes: list[tuple[str, TrainConfig, str]] = []
    if not train.gradient_checkpointing:  # recomputed layers cannot be compiled
        change = "train.gradient_checkpointing: true" + " with torch_compile: false" * train.torch_compile
        changes.append((change, replace(train, gradient_checkpointing=True, torch_compile=False), precision))
    smaller = train
    least = train.num_processes  # each process has a row of every batch
    while smaller.batch_size > least:
        size = max(least, smaller.batch_size // 2 // least * least)
        num_batches = -(-train.rows_per_step // size)
        smaller = replace(train, batch_size=size, gradient_accumulation_steps=num_batches)
        change = f"train.batch_size: {size} with gradient_accumulation_steps: {num_batches}"
        if memory_of(smaller, precision).total <= limit or size == least:
            changes.append((change, smaller, precision))
            break
    shorter = train
    while shorter.max_prompt_tokens >= 2 * MIN_PROMPT_TOKENS:
        shorter = replace(shorter, max_prompt_tokens=shorter.max_prompt_tokens // 2)
        is_last = shorter.max_prompt_tokens < 2 * MIN_PROMPT_TOKENS
        if memory_of(shorter, precision).total <= limit or is_last:
            changes.append((f"train.max_prompt_tokens: {shorter.max_prompt_tokens}", shorter, precision))
            break
    if precision == "fp32":
        changes.append(("weights in bf16, on a device that computes in it", train, "bf16"))
    if train.quantize != "4bit":
        on_cuda = "train.quantize: 4bit, on a CUDA device with bitsandbytes"
        changes.append((on_cuda, replace(train, quantize="4bit"), precision))
    if len(changes) > 1:
        everything = replace(
            smaller,
            gradient_checkpointing=True,
            torch_compile=False,
            max_prompt_tokens=shorter.max_prompt_tokens,
            quantize="4bit",
        )
        changes.append(("all of these together", everything, "bf16"))
    before = memory_of(train, precision).total
    totals = [(change, memory_of(changed, its_precision).total) for change, changed, its_precision in changes]
    return tuple(
        Remedy(change=change, total_bytes=total, fits=total <= limit)
        for change, total in totals
        if total < before  # for example, a lower limit of prompts saves nothing if the rows are short
    )
