"""How a training's steps are computed: the kind of attention, and compiled layers. Neither stays after the training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from deal_core.config import FLASH_ATTENTION
from deal_core.errors import ConfigError
from deal_core.limits import require

BACKEND = "inductor"
"""What compiles; on a CPU it needs a C++ compiler."""


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Let a base model compute attention in another way; auto changes nothing.

    Raises:
        ConfigError: The model, this machine or the precision does not fit.
    """
    if name in ("auto", model.config._attn_implementation):
        return
    problem = f"train.attention is {name}"
    if name == FLASH_ATTENTION:
        dtype = next(model.parameters()).dtype
        require(torch.cuda.is_available(), f"{problem}, which needs a CUDA device; set it to auto on this machine.")
        require(dtype != torch.float32, f"{problem}, which has no fp32; set the precision to bf16, or it to auto.")
    try:
        model.set_attn_implementation(name)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{problem}: {error} Set it to auto to go without.") from error
    require(
        model.config._attn_implementation == name,
        f"{problem}, and a base model of type {model.config.model_type!r} has one kind alone; set it to auto.",
    )


@contextmanager
def compiled_layers(model: nn.Module) -> Iterator[None]:
    """Compile each layer of a base model in place, with its adapter, until the end of the block.

    Equal layers share what is compiled. Lengths of batches are symbols, so a new length compiles nothing.

    Raises:
        ConfigError: The model's layers cannot be told.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    require(bool(layers), f"train.torch_compile does not know the layers of {type(model).__name__}; set it to false.")
    for layer in layers:
        layer.compile(backend=BACKEND, dynamic=True)
    try:
        yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None
