"""A base model that no device holds as a whole: FSDP2 keeps a part of every layer in each process.

The frozen layers are sharded. Embeddings, output layer and the LoRA factors stay whole on every device, so strategies
see the same factors as without. The first process reads the weights and sends them layer by layer, so another one holds
its parts and one layer in main memory. A layer is gathered while it computes, and every process must compute it at the
same time: `in_step` lets processes with unequal work do so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from deal_core.base_model.language_model import LanguageModel
from deal_core.errors import ConfigError


def shard_base(model: LanguageModel) -> None:
    """Shard the frozen layers of a model in main memory over the processes, and move all else to this one's device.

    Every process calls this, with the same model. The weights are those of the first process. An adapter on the model
    stays whole.

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
    # of a layer, all but the adapter's factors is divided
    parameters = [(p, id(p) not in within or ".lora_" in name) for name, p in model.named_parameters()]
    whole = {parameter for parameter, is_whole in parameters if is_whole}
    _send([parameter for parameter, is_whole in parameters if is_whole], state.device)
    for name, buffer in model.named_buffers():
        owner = model.get_submodule(name.rpartition(".")[0])
        (owner._buffers[name.rpartition(".")[2]],) = _sent([buffer], state.device)
    mesh = init_device_mesh(state.device.type, (state.num_processes,))
    for layer in layers:
        _send([parameter for parameter in layer.parameters() if parameter not in whole], state.device)
        fully_shard(layer, mesh=mesh, ignored_params=whole)
    fully_shard(decoder, mesh=mesh, ignored_params=whole)
    _read_a_token(decoder)  # FSDP2 makes its buffers now: made in inference mode, they could not be used in training


def _send(parameters: Sequence[nn.Parameter], device: torch.device) -> None:
    """Give every process the first one's values of these parameters, on the device."""
    for parameter, values in zip(parameters, _sent(parameters, device), strict=True):
        parameter.data = values


@torch.no_grad()
def _sent(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Return the first process's values of these tensors, on the device. Their shapes are the same everywhere."""
    dtypes = [[tensor.dtype for tensor in tensors]]
    dist.broadcast_object_list(dtypes, src=0, device=device)
    received = []
    for tensor, dtype in zip(tensors, dtypes[0], strict=True):
        values = tensor.detach().to(device, dtype).contiguous()
        dist.broadcast(values.flatten().view(torch.uint8), src=0)  # as bytes: not every backend knows every type
        received.append(values)
    return received


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
