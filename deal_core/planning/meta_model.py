"""Measure a base model without its weights: it is built from its config on PyTorch's meta device.

Nothing is allocated: parameters and activations have shapes but no content. So every architecture that transformers can
build can be measured, without formulas for each.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.pytorch_utils import Conv1D

from deal_core.adapter.precision import base_precision
from deal_core.adapter.stack import collect_stacks
from deal_core.adapter.state import attach_adapter
from deal_core.base_model import cpu_attention as attention
from deal_core.base_model.sources import auto_class
from deal_core.config import AdapterConfig
from deal_core.data.collate import answer_loss
from deal_core.errors import ConfigError
from deal_core.planning.memory import ActivationSize, BatchShape, ModelSize

FUSED, PRODUCTS = "sized_fused", "sized_products"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_LAYER_COUNTS = ("num_hidden_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")


def measure_model(config: Any, adapter: AdapterConfig) -> ModelSize:
    """Return the sizes of the model that a config of transformers describes, and of the modules with the adapter.

    Raises:
        ConfigError: transformers cannot build the model, or the adapter does not fit it.
    """
    model = _empty_model(config, "fp32")
    text = config.get_text_config()  # a model that also sees pictures has a config of its own for its texts
    parameters = _count_by_kind(model)
    with torch.device("meta"):
        stacks = collect_stacks(attach_adapter(model, adapter, seed=0))
    modules = tuple(
        (b.shape[0], a.shape[1]) for stack in stacks for a, b in zip(stack.a_params, stack.b_params, strict=True)
    )
    hidden_size = _size(text, "hidden_size")
    num_heads = _size(text, "num_attention_heads", otherwise=0)  # a state space model has none
    return ModelSize(
        model_type=str(config.model_type),
        parameters=parameters,
        num_layers=_size(text, "num_hidden_layers"),
        hidden_size=hidden_size,
        attention_size=num_heads * _size(text, "head_dim", "d_kv", otherwise=hidden_size // max(1, num_heads)),
        intermediate_size=_size(text, "intermediate_size", "d_ff", otherwise=4 * hidden_size),
        num_heads=num_heads,
        vocab_size=_size(text, "vocab_size"),
        modules=modules,
    )


def _size(config: Any, *names: str, otherwise: int | None = None) -> int:
    """The first of these numbers that a config states as one number for all layers."""
    for name in names:
        if isinstance(value := getattr(config, name, None), int):
            return value
    if otherwise is None:
        raise ConfigError(f"The config of a {config.model_type} has no number {names[0]}, so it cannot be measured.")
    return otherwise


def measure_activations(
    config: Any, adapter: AdapterConfig, batch: BatchShape, precision: str, *, on_cpu: bool
) -> ActivationSize:
    """Return the bytes that autograd keeps of one batch, by running the trainer's forward pass on the meta device.

    The model is built with two and with three layers; the difference is the share of a layer. Attention scores are not
    kept. For the models of `deal_core.base_model.cpu_attention`, a CPU keeps queries, keys and values. Elsewhere
    PyTorch's fused attention also keeps its output, and it keeps keys and values once per query head, because
    transformers repeats them if there is a mask.

    Raises:
        ConfigError: The model's forward pass reads the content of its tensors, as some mixtures of experts do. Then
            only its weights can be measured, not its activations.
    """
    two, three = (
        _kept_bytes(_with_layers(config, count), adapter, batch, precision, on_cpu=on_cpu) for count in (2, 3)
    )
    layer = three - two
    width = DTYPES[precision].itemsize * _size(config.get_text_config(), "hidden_size")
    num_stacks = 2 if getattr(config, "is_encoder_decoder", False) else 1
    return ActivationSize(
        layer=layer, rest=max(0, two - 2 * layer), boundary=num_stacks * batch.num_rows * batch.num_tokens * width
    )


def _empty_model(config: Any, precision: str, **options: Any) -> Any:
    try:
        with init_empty_weights(include_buffers=True):
            model = auto_class(config).from_config(config, dtype=DTYPES[precision], trust_remote_code=False, **options)
    except Exception as error:  # a config can be wrong in many ways
        raise ConfigError(
            f"transformers cannot build a {getattr(config, 'model_type', 'model')} from its config "
            f"({type(error).__name__}: {error}). Give a causal or sequence-to-sequence language model of an "
            "architecture that transformers itself knows."
        ) from error
    return model.requires_grad_(False)


def _count_by_kind(model: nn.Module) -> dict[str, int]:
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    output = model.get_output_embeddings()  # type: ignore[operator]
    head = id(output.weight) if isinstance(output, nn.Linear) else None
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear | Conv1D)}
    kinds = ("linear layers", "other matrices", "embeddings", "output layer", "norms and biases")
    counts = dict.fromkeys(kinds, 0)
    for parameter in model.parameters():  # tied parameters come once
        kind = "other matrices" if parameter.ndim > 1 else "norms and biases"
        if id(parameter) in linear:
            kind = "linear layers"
        if id(parameter) in embeddings:
            kind = "embeddings"
        elif id(parameter) == head:
            kind = "output layer"
        counts[kind] += parameter.numel()
    return counts


def _with_layers(config: Any, count: int) -> Any:
    shallow = copy.deepcopy(config)
    text = shallow.get_text_config()
    for name in _LAYER_COUNTS:
        if getattr(text, name, None) is not None:
            setattr(text, name, count)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:count]
    return shallow


def _kept_bytes(config: Any, adapter: AdapterConfig, batch: BatchShape, precision: str, *, on_cpu: bool) -> int:
    """Bytes of all tensors that autograd saves in one forward pass, without the model's own tensors."""
    for name in (FUSED, PRODUCTS):
        AttentionInterface.register(name, partial(_attend, is_fused=name == FUSED))
        AttentionMaskInterface.register(name, sdpa_mask)
    seq2seq = bool(getattr(config, "is_encoder_decoder", False))
    attention_name = PRODUCTS if on_cpu and config.model_type in attention.MODEL_TYPES else FUSED
    options = {} if seq2seq else {"attn_implementation": attention_name}
    model = _empty_model(config, precision, **options)
    saved: dict[int, Tensor] = {}
    with torch.device("meta"):
        adapted = attach_adapter(model, adapter, seed=0)
        own = {t.untyped_storage()._cdata for t in (*adapted.parameters(), *adapted.buffers())}

        def keep(tensor: Tensor) -> Tensor:
            saved[tensor.untyped_storage()._cdata] = tensor
            return tensor

        try:
            products = nullcontext() if on_cpu else base_precision(adapted)
            with products, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                answer_loss(adapted, _empty_batch(batch, is_seq2seq=seq2seq))
        except Exception as error:  # an architecture may do anything with the content of its tensors
            raise ConfigError(
                f"The activations of a {config.model_type} cannot be sized without its weights "
                f"({type(error).__name__})."
            ) from error
    return sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in own)


def _empty_batch(batch: BatchShape, *, is_seq2seq: bool) -> dict[str, Tensor]:
    """A batch in the form of `AnswerCollator`, without content."""
    rows, tokens, answer = batch.num_rows, batch.num_tokens, batch.num_answer_tokens
    if is_seq2seq:
        labels = torch.zeros(rows, answer, dtype=torch.long)
        return {"input_ids": torch.zeros(rows, tokens - answer, dtype=torch.long), "labels": labels}
    labels = torch.zeros(rows, answer, dtype=torch.long)
    input_ids = torch.zeros(rows, tokens, dtype=torch.long)
    # transformers uses a mask of four dimensions unchanged; to make one, it would read the content of another
    mask = torch.ones(rows, 1, tokens, tokens, dtype=torch.bool)
    return {"input_ids": input_ids, "attention_mask": mask, "position_ids": input_ids, "labels": labels}


class _Kept(torch.autograd.Function):
    """Saves its inputs for the backward pass, and optionally its output."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, keeps_output: bool) -> Tensor:
        output = torch.empty_like(query[..., : value.shape[-1]])
        ctx.save_for_backward(query, key, value, mask, *([output] if keeps_output else []))
        return output


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    is_fused: bool,
    **options: Any,
) -> tuple[Tensor, None]:
    if is_fused:
        num_repeats = query.shape[1] // key.shape[1]
        key, value = (heads.repeat_interleave(num_repeats, dim=1) for heads in (key, value))
    output: Tensor = _Kept.apply(query, key, value, attention_mask, is_fused)  # type: ignore[no-untyped-call]
    return output.transpose(1, 2).contiguous(), None
