"""LoRA's products in the precision of the base model, while the factors and their gradients stay fp32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

FP32_ON = ("cpu",)
"""Devices on which a training computes the products in fp32, whatever the base model's type.

This project's figures were measured so. A step on a CPU takes 5 % longer for it.
"""


class _CastFactor(nn.Linear):
    """A factor that takes the type of its input for a product. The gradient comes back in the type of the weight."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.nn.functional.linear(input, self.weight.to(input.dtype))


@contextmanager
def base_precision(model: nn.Module) -> Iterator[None]:
    """Compute the adapter's products in the type of the layers' inputs until the end of the block.

    PEFT alone casts every input to fp32. With a base model in bf16, each layer then keeps a copy of twice the size for
    its backward pass, and its products are those of fp32. Here an input stays as it is: layers that read the same one
    keep it once. The base model is computed as without an adapter, which torch.autocast would change.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    factors = [
        factor
        for layer in layers
        for part in (layer.lora_A, layer.lora_B)
        for factor in part.values()
        if type(factor) is nn.Linear
    ]
    for factor in factors:
        factor.__class__ = _CastFactor
    try:
        with disable_input_dtype_casting(model):
            yield
    finally:
        for factor in factors:
            factor.__class__ = nn.Linear
