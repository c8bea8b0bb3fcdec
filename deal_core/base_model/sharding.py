"""A base model that no device holds as a whole: FSDP2 keeps a part of every layer in each process.

The frozen layers are sharded. Embeddings, output layer and the LoRA factors stay whole on every device, so strategies
see the same factors as without. A layer is gathered while it computes, and every process must compute it at the same
time: `in_step` lets processes with unequal work do so.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from peft import PeftModel
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from deal_core.base_model.language_model import LanguageModel
from deal_core.errors import ConfigError


def shard_base(model: LanguageModel) -> None:
    """Shard the frozen layers of a model in main memory over the processes, and move all else to this one's device.

    Every process calls this, with the same model. An adapter on the model stays whole.

    Raises:
        ConfigError: The model is quantized, an encoder-decoder, or has no list of layers; or there is one process.
    """
    state = PartialState()
    if getattr(model, "is_quantized", False):
        raise ConfigError(
            "A base model in 8 or 4 bits cannot be sharded; set train.quantize to none, or unset DEAL_SHARD."
        )
    if model.config.is_encoder_decoder:
        raise ConfigError("An encoder-decoder cannot be sharded; unset DEAL_SHARD.")
    if not dist.is_initialized():
        raise ConfigError("One process cannot shard a base model; set train.num_processes to 2 or more.")
    decoder = _decoder_of(model)
    layers = next(child for child in decoder.children() if isinstance(child, nn.ModuleList))
    within = {id(parameter) for parameter in layers.parameters()}
    # of a layer, the frozen parameters are its own: an adapter's are trained, or named lora_A and lora_B
    whole = {p for name, p in model.named_parameters() if id(p) not in within or p.requires_grad or ".lora_" in name}
    for parameter in whole:
        parameter.data = parameter.data.to(state.device)
    for name, buffer in model.named_buffers():
        owner = model.get_submodule(name.rpartition(".")[0])
        owner._buffers[name.rpartition(".")[2]] = buffer.to(state.device)
    mesh = init_device_mesh(state.device.type, (state.num_processes,))
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=whole)
    fully_shard(decoder, mesh=mesh, ignored_params=whole)
    _read_a_token(decoder)  # FSDP2 makes its buffers now: made in inference mode, they could not be used in training


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard_base` has sharded the model."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


@contextmanager
def in_step(model: LanguageModel) -> Iterator[None]:
    """Let the processes call a sharded model as often as each of them needs to, until all leave the block.

    Before every pass the processes count who still computes. One that has done its work reads a single token with the
    others, until none is left. A model that is not sharded needs nothing of this.
    """
    if not is_sharded(model):
        yield
        return
    decoder, device = _decoder_of(model), PartialState().device

    def computing(own: int) -> int:
        number = torch.tensor(own, device=device)
        dist.all_reduce(number)
        return int(number)

    hook = decoder.register_forward_pre_hook(lambda *_: computing(1) and None)
    try:
        yield
    finally:
        hook.remove()
    while computing(0):
        _read_a_token(decoder)


@torch.no_grad()
def _read_a_token(decoder: nn.Module) -> None:
    decoder(input_ids=torch.zeros(1, 1, dtype=torch.long, device=PartialState().device), use_cache=False)


def _decoder_of(model: LanguageModel) -> Any:
    """The module with the list of layers, which every pass calls."""
    base: nn.Module = model.get_base_model() if isinstance(model, PeftModel) else model
    for module in base.modules():
        if any(isinstance(child, nn.ModuleList) for child in module.children()):
            return module
    raise ConfigError(f"{type(base).__name__} has no list of layers that could be sharded; unset DEAL_SHARD.")
