"""The precision of LoRA's products: that of the base model, with factors and gradients in fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from deal_core.adapter.precision import base_precision
from deal_core.adapter.state import attach_adapter
from deal_core.base_model.load import BaseModel
from deal_core.config import AdapterConfig
from tests.unit.deal_core.conftest import SHORT, Train, weights


def adapted(base: BaseModel, dtype: torch.dtype) -> PeftModel:
    """The base model with an adapter that changes its answers."""
    model = attach_adapter(base.model.to(dtype), AdapterConfig(rank=4), seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def step(model: PeftModel) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits of two texts, and the gradients of the factors."""
    logits = model(input_ids=torch.arange(24).view(2, 12)).logits
    logits.float().square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return logits.detach(), gradients


def kept_by_a_layer(model: PeftModel, dtype: torch.dtype) -> set[torch.dtype]:
    """The types of what a layer with an adapter keeps of its input for the backward pass."""
    kept = set[torch.dtype]()

    def keep(tensor: Tensor) -> Tensor:
        if tensor.shape[0] == 12:
            kept.add(tensor.dtype)
        return tensor

    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(torch.ones(12, model.config.hidden_size, dtype=dtype))
    return kept


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_layer_keeps_its_input_as_it_is_and_gradients_are_fp32(base: BaseModel, dtype: torch.dtype) -> None:
    model = adapted(base, dtype)
    usual_logits, usual = step(model)
    assert kept_by_a_layer(model, dtype) == {torch.float32}
    with base_precision(model):
        logits, gradients = step(model)
        assert kept_by_a_layer(model, dtype) == {dtype}
    limit = 0.05 if dtype == torch.bfloat16 else 0.0
    assert (logits - usual_logits).float().norm() <= limit * usual_logits.float().norm()
    assert gradients.keys() == usual.keys() and len(usual) == len(model.targeted_module_names) * 2
    for name, expected in usual.items():
        assert gradients[name].dtype == torch.float32
        assert (gradients[name] - expected).norm() <= limit * expected.norm()
    assert torch.equal(step(model)[0], usual_logits), "nothing stays on the model"


def test_a_training_on_a_base_in_bf16_computes_its_adapter_in_bf16(
    base: BaseModel, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deal_core.training.train.FP32_ON", ())
    expected = train("deal", train=SHORT).losses
    base.model.to(torch.bfloat16)
    types = set[torch.dtype]()

    def note(module: nn.Module, given: Any, output: Any) -> None:
        is_factor = isinstance(module, nn.Linear) and module.weight.requires_grad
        if is_factor and torch.is_grad_enabled():  # the model also answers questions before its first step
            types.add(output.dtype)

    with torch.nn.modules.module.register_module_forward_hook(note):
        found = train("deal", train=SHORT)
    assert types == {torch.bfloat16}
    assert found.losses == pytest.approx(expected, rel=0.05)
    assert {weight.dtype for weight in weights(found.folder).values()} == {torch.float32}
