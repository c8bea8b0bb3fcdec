"""The norm of a saved adapter is that of the ΔW which PEFT would merge."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from deal_core.adapter.state import adapter_norm


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_norm_is_that_of_the_merged_change(tmp_path: Path, use_rslora: bool) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["0", "1"], use_rslora=use_rslora)
    model = get_peft_model(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4)), config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight)
    layers = [module for module in model.modules() if hasattr(module, "get_delta_weight")]
    total = sum(float(layer.get_delta_weight("default").square().sum()) for layer in layers)
    model.save_pretrained(tmp_path)
    assert adapter_norm(tmp_path) == pytest.approx(total**0.5, rel=1e-5)

    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = float("inf")
    save_file(tensors, file)
    assert adapter_norm(tmp_path) is None
