"""One teacher-forced pass gives each row's loss, its answer's probability and whether the greedy answer is right."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

from deal_core.adapter.state import adapter_on
from deal_core.config import TrainConfig
from deal_core.data.collate import AnswerCollator, answer_logits, encode_rows
from deal_core.evaluation import likelihood as module
from deal_core.evaluation.likelihood import measure

TRAIN = TrainConfig(max_prompt_tokens=64)
LIMITS = {"max_prompt_tokens": TRAIN.max_prompt_tokens, "max_answer_tokens": 50}


def test_a_rows_figures_are_those_of_the_row_alone(base, parent, task, rows, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ROWS", 5)
    data = rows(12)
    encoded = encode_rows(data, base.tokenizer, task, max_prompt_tokens=64, max_answer_tokens=50)
    collate = AnswerCollator(base.tokenizer, is_seq2seq=False)
    seen = []
    with adapter_on(base.model, parent) as model:
        found = measure(model, base.tokenizer, task, data, **LIMITS, on_progress=seen.append)
        for row in range(len(data)):
            batch = collate([encoded[row]])
            with torch.no_grad():
                logits_KV = answer_logits(model, batch)[0]
            losses_K = cross_entropy(logits_KV, batch["labels"][0], reduction="none")
            torch.testing.assert_close(found.loss_N[row].float(), losses_K.sum(), rtol=1e-4, atol=1e-4)
            assert found.num_tokens_N[row] == len(losses_K)
            logits_KV.requires_grad_()
            cross_entropy(logits_KV, batch["labels"][0], reduction="sum").backward()
            torch.testing.assert_close(found.gradient_N[row].float(), logits_KV.grad.norm(), rtol=1e-3, atol=1e-4)
            assert found.num_hits_N[row] == (logits_KV.argmax(-1) == batch["labels"][0]).sum()
    assert sum(seen) == 12
    torch.testing.assert_close(found.mean_loss, found.loss_N / found.num_tokens_N)
