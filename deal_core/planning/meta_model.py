"""Measure a base model without its weights: it is built from its config on PyTorch's meta device.

Nothing is allocated: parameters have shapes but no content. So every architecture that transformers can build can be
measured.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from deal_core.adapter.stack import collect_stacks
from deal_core.adapter.state import attach_adapter
from deal_core.base_model import cpu_attention
from deal_core.base_model.sources import auto_class
from deal_core.config import AdapterConfig
from deal_core.errors import ConfigError
from deal_core.planning.memory import LayerSize, ModelSize, Part

CROSS_ATTENTION = re.compile("EncDecAttention|encoder_attn|crossattention")
"""Names of the attention that reads the prompt in the decoders of transformers."""
FURTHER_STEPS = {"NewGELUActivation": 3, "QuickGELUActivation": 1, "FastGELUActivation": 6}
"""Activations that compute in several steps, each of which keeps a tensor. The others keep their input alone."""


def measure_model(config: Any, adapter: AdapterConfig) -> ModelSize:
    """Return the sizes of the model that a config of transformers describes, and of the modules with the adapter.

    Raises:
        ConfigError: transformers cannot build the model, or the adapter does not fit it.
    """
    model = _empty_model(config)
    text = config.get_text_config()  # a model that also sees pictures has a config of its own for its texts
    parameters = _count_by_kind(model)
    with torch.device("meta"):
        stacks = collect_stacks(attach_adapter(model, adapter, seed=0))
    modules = tuple(
        (b.shape[0], a.shape[1]) for stack in stacks for a, b in zip(stack.a_params, stack.b_params, strict=True)
    )
    hidden_size = _size(text, "hidden_size")
    num_heads = _size(text, "num_attention_heads", otherwise=0)  # a state space model has none
    head_size = _size(text, "head_dim", "d_kv", otherwise=hidden_size // max(1, num_heads))
    has_encoder = bool(getattr(config, "is_encoder_decoder", False))
    decoder: Part = "answer" if has_encoder else "row"
    layers = [*_layers(model.get_decoder(), decoder, text)]
    if has_encoder:
        layers = [*_layers(model.get_encoder(), "prompt", text), *layers]
    return ModelSize(
        model_type=str(config.model_type),
        parameters=parameters,
        num_layers=_size(text, "num_hidden_layers"),
        hidden_size=hidden_size,
        attention_size=num_heads * head_size,
        key_size=head_size * _size(text, "num_key_value_heads", otherwise=num_heads),
        intermediate_size=_size(text, "intermediate_size", "d_ff", otherwise=4 * hidden_size),
        num_heads=num_heads,
        vocab_size=_size(text, "vocab_size"),
        modules=modules,
        layers=tuple(layers),
        has_own_cpu_attention=config.model_type in cpu_attention.MODEL_TYPES,
    )


def _size(config: Any, *names: str, otherwise: int | None = None) -> int:
    """The first of these numbers that a config states as one number for all layers."""
    for name in names:
        if isinstance(value := getattr(config, name, None), int):
            return value
    if otherwise is None:
        raise ConfigError(f"The config of a {config.model_type} has no number {names[0]}, so it cannot be measured.")
    return otherwise


def _layers(stack: nn.Module, part: Part, text: Any) -> Iterator[LayerSize]:
    """The layers of an encoder or a decoder that reads this part of a row.

    A layer with cross-attention comes as two, because the keys and values of that attention are made of the prompt.
    """
    hidden, num_experts = _size(text, "hidden_size"), _size(text, "num_experts_per_tok", otherwise=1)
    for layer in next(module for module in stack.modules() if isinstance(module, nn.ModuleList)):
        sizes: dict[Part, Counter[str]] = {part: Counter()}
        for path, parent in layer.named_modules():
            if isinstance(parent, LoraLayer) or "lora_" in path:
                continue  # a module with the adapter counts where its parent is met
            own = sizes[part]
            up = down = 0  # features that the modules of this parent make of the residual stream, and turn back into it
            inputs: set[int] = set()
            for name, module in parent.named_children():
                if "norm" in type(module).__name__.lower():
                    own["norms"] += _norm_size(parent, name)
                if not isinstance(module, LoraLayer | nn.Linear | Conv1D):
                    continue
                num_in, num_out = _features(module)
                up += num_out * (num_in == hidden)
                down += num_in * (num_out == hidden)
                reads_prompt = CROSS_ATTENTION.search(path) is not None and name[0] in "kv"
                size = sizes.setdefault("prompt", Counter()) if reads_prompt else own
                size["outputs"] += num_out
                if isinstance(module, LoraLayer):
                    inputs.add(num_in)
                    size["adapted_inputs"] += num_in
                    size["num_adapted"] += 1
            if not up:
                own["outputs"] += num_experts * _expert_size(parent, hidden)
                continue
            own["inputs"] += sum(inputs)
            own["outputs"] -= hidden  # the last output is added to the residual stream, and not kept
            if "attention" in type(parent).__name__.lower():
                own["num_attentions"] += 1
            else:  # the gate's features go through the activation, and then times the others
                steps = sum(FURTHER_STEPS.get(type(module).__name__, 0) for module in parent.children())
                own["outputs"] += max(0, up - down) + down * steps
        for read, size in sizes.items():
            yield LayerSize(part=read, **size)


def _features(module: Any) -> tuple[int, int]:
    """(in features, out features) of a linear layer."""
    return (module.nx, module.nf) if isinstance(module, Conv1D) else (module.in_features, module.out_features)


def _norm_size(parent: nn.Module, name: str) -> int:
    """Size of what a norm reads of one token. The norm of the heads reads a whole projection."""
    if name in ("q_norm", "k_norm"):
        return _features(parent.get_submodule(name.replace("norm", "proj")))[1]
    return cast(nn.Parameter, parent.get_submodule(name).weight).numel()


def _expert_size(parent: nn.Module, hidden: int) -> int:
    """Features that one expert of a mixture makes of a token. Only the weights of experts have three dimensions."""
    shapes = [weight.shape[1:] for weight in parent.parameters(recurse=False) if weight.ndim == 3]
    up = sum(num_out for num_out, num_in in shapes if num_in == hidden)
    down = sum(num_in for num_out, num_in in shapes if num_out == hidden)
    return sum(num_out for num_out, _ in shapes) + max(0, up - down)


def _empty_model(config: Any) -> Any:
    try:
        with init_empty_weights(include_buffers=True):
            model = auto_class(config).from_config(config, dtype=torch.float32, trust_remote_code=False)
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
