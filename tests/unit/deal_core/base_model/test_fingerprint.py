"""A base model is known by its log-probabilities of a fixed text, also in another precision."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from deal_core.base_model.fingerprint import MOST_APART, apart, text_log_probs
from deal_core.base_model.load import BaseModel


def test_another_precision_is_the_same_model_and_another_seed_is_not(base: BaseModel) -> None:
    tokens, own = text_log_probs(base.model, base.tokenizer)
    ids = torch.tensor([tokens])
    with torch.no_grad():
        assert -sum(own) / len(own) == pytest.approx(float(base.model(input_ids=ids, labels=ids).loss), rel=1e-4)
    _, rounded = text_log_probs(copy.deepcopy(base.model).to(torch.bfloat16), base.tokenizer)
    assert 0 < apart(own, rounded) < MOST_APART / 3
    torch.manual_seed(1)
    _, other = text_log_probs(AutoModelForCausalLM.from_config(base.model.config).float().eval(), base.tokenizer)
    assert apart(own, other) > 3 * MOST_APART
    with torch.no_grad():  # a head that was trained on
        base.model.get_output_embeddings().weight.mul_(1.3)
    assert apart(own, text_log_probs(base.model, base.tokenizer)[1]) > MOST_APART
