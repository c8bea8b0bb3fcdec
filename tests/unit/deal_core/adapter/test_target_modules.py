"""Which layers carry the adapter of a base model if nobody names them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft.tuners.lora import LoraLayer

from deal_core.adapter.state import attach_adapter
from deal_core.base_model.load import BaseModel
from deal_core.config import AdapterConfig
from deal_core.errors import ConfigError
from tests.unit.deal_core.conftest import small_model, train_into, weights


@pytest.mark.parametrize(
    ("model_type", "wanted"),
    [
        ("qwen3", {"q_proj", "v_proj"}),
        ("phi3", {"qkv_proj"}),
        ("gpt_neox", {"query_key_value"}),  # PEFT's own
        ("starcoder2", {"q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"}),  # nobody's: all but the output
    ],
)
def test_layers_are_the_types_own_or_those_of_peft_or_all_linear_ones(model_type: str, wanted: set[str]) -> None:
    model = attach_adapter(small_model(model_type), AdapterConfig(rank=4), seed=0)
    found = [name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    assert {*found} == wanted and len(found) == 2 * len(wanted), "in both layers"


def test_a_phi3_is_learned(base: BaseModel, tmp_path: Path) -> None:
    phi3 = replace(base, model=small_model("phi3", base.model.config.vocab_size))
    first = train_into(tmp_path / "first", phi3, "deal")
    second = train_into(tmp_path / "second", phi3, "deal", first.folder)
    one, other = weights(first.folder), weights(second.folder)
    assert all("qkv_proj" in name for name in one) and any(not torch.equal(one[name], other[name]) for name in one)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in other.values())


def test_of_a_model_that_sees_pictures_the_layers_have_to_be_named() -> None:
    model = small_model("starcoder2")
    model.config.get_text_config = lambda *_, **__: object()
    with pytest.raises(ConfigError) as refused:
        attach_adapter(model, AdapterConfig(rank=4), seed=0)
    assert refused.value.code == "target-modules"
