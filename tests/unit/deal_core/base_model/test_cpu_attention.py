"""Training's own backward pass of attention gives the gradients of PyTorch's, and its forward pass the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from deal_core.base_model import cpu_attention as attention

B, H, G, T, D = 2, 6, 2, 7, 4


class Layer(nn.Module):
    """A layer as transformers passes it to an attention function."""

    is_causal = True
    num_key_value_groups = H // G


def masks() -> dict[str, torch.Tensor | None]:
    truth = torch.ones(T, T, dtype=torch.bool).tril().expand(B, 1, T, T).clone()
    truth[0, :, :, :3] = False  # padding on the left: its own rows attend to nothing
    numbers = torch.randn(B, 1, T, T, generator=torch.Generator().manual_seed(1))
    return {"causal": None, "padded": truth, "numbers": numbers}


def gradients(function, mask, **options):
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, H, T, D), (B, G, T, D), (B, G, T, D))
    inputs = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    output, weights = function(Layer(), *inputs, mask, **options)
    assert weights is None
    upstream = torch.randn(output.shape, generator=generator)
    upstream[0, :3] = 0.0  # the output at padding is never read
    output.backward(upstream)
    return output, [each.grad for each in inputs]


@pytest.mark.parametrize("name", ["causal", "padded", "numbers"])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_gradients_are_those_of_the_fused_attention(name, scaling):
    output, ours = gradients(attention.attend, masks()[name], scaling=scaling)
    expected, theirs = gradients(sdpa_attention_forward, masks()[name], scaling=scaling)
    torch.testing.assert_close(output, expected, rtol=0, atol=0)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_beyond_a_number_of_scores_it_is_the_fused_one(monkeypatch):
    monkeypatch.setattr(attention, "MAX_SCORES", B * H * T * T - 1)
    monkeypatch.setattr(attention, "_products", None)
    _, ours = gradients(attention.attend, None)
    _, theirs = gradients(sdpa_attention_forward, None)
    assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))


def test_an_encoder_attends_to_both_sides():
    _, ours = gradients(attention.attend, None, is_causal=False)
    _, theirs = gradients(sdpa_attention_forward, None, is_causal=False)
    _, causal = gradients(sdpa_attention_forward, None)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(ours[0], causal[0])


def test_the_base_model_attends_this_way(base):
    assert base.model.config._attn_implementation == attention.NAME
