"""Attention for training on a CPU: PyTorch's fused forward pass, and a backward pass made of matrix products.

On a CPU, PyTorch's fused backward pass is slower than separate matrix products (`python -m benchmarks.speed.steps cost`
measures both). The backward pass here computes the probabilities of one layer at a time again, so it keeps no more
memory between the passes than the fused one. PyTorch's own attention is used without gradients, with dropout, beyond
MAX_SCORES and on other devices.

Shapes: B batch, H heads, G heads of keys and values (H a multiple of it), T queries, S keys, D size of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_product_backward"
MODEL_TYPES = ("llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3")
"""Models with exactly this attention; some other models test for the name "sdpa" to apply their own masks."""
MAX_SCORES = 2**26
"""Largest B·H·T·S without the fused pass: the products need about 16 bytes per score, for one layer at a time."""


def attend(
    module: nn.Module,
    query_BHTD: Tensor,
    key_BGSD: Tensor,
    value_BGSD: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend like transformers' "sdpa". Returns the output, shape B×T×H×D, and None for the weights."""
    is_known = query_BHTD.shape[2] == key_BGSD.shape[2] or attention_mask is not None  # all keys, or those of the mask
    is_plain = is_known and dropout == 0.0 and kwargs.get("position_bias") is None
    is_plain = is_plain and query_BHTD.shape[:3].numel() * key_BGSD.shape[2] <= MAX_SCORES
    if not (torch.is_grad_enabled() and query_BHTD.device.type == "cpu" and is_plain):
        fused: tuple[Tensor, None] = sdpa_attention_forward(
            module,
            query_BHTD,
            key_BGSD,
            value_BGSD,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )
        return fused
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = causal and attention_mask is None and query_BHTD.shape[2] > 1
    scale = query_BHTD.shape[-1] ** -0.5 if scaling is None else scaling
    attend_with_products: Callable[..., Tensor] = _Attention.apply
    output_BHTD = attend_with_products(query_BHTD, key_BGSD, value_BGSD, attention_mask, causal, scale)
    return output_BHTD.transpose(1, 2).contiguous(), None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, mask)
        ctx.is_causal, ctx.scale = is_causal, scale
        return nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask = ctx.saved_tensors
        inputs = query, key, value = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
        with torch.enable_grad():
            output = _products(query, key, value, mask, ctx.is_causal, ctx.scale)
        return (*torch.autograd.grad(output, inputs, grads[0]), None, None, None)


def _products(
    query_BHTD: Tensor, key_BGSD: Tensor, value_BGSD: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    """Return softmax(s·Q·Kᵀ + M)·V; M is a boolean mask (True: attend) or a mask of numbers to add."""
    num_repeats = query_BHTD.shape[1] // key_BGSD.shape[1]
    key_BHSD, value_BHSD = (heads.repeat_interleave(num_repeats, dim=1) for heads in (key_BGSD, value_BGSD))
    scores_BHTS = (query_BHTD * scale) @ key_BHSD.mT
    if is_causal:
        mask = scores_BHTS.new_ones(scores_BHTS.shape[-2:], dtype=torch.bool).tril()
    if mask is not None and mask.dtype == torch.bool:
        scores_BHTS = scores_BHTS.masked_fill(~mask, torch.finfo(scores_BHTS.dtype).min)
    elif mask is not None:
        scores_BHTS = scores_BHTS + mask
    return scores_BHTS.softmax(-1, dtype=torch.float32).to(value_BGSD.dtype) @ value_BHSD


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
