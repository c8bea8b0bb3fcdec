"""One teacher-forced pass gives each row's loss, its answer's probability and whether the greedy answer is right."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

from deal_core.adapter.state import adapter_on
from deal_core.config import EvaluateConfig, TrainConfig
from deal_core.data.collate import AnswerCollator, answer_logits, encode_rows
from deal_core.evaluation import likelihood as module
from deal_core.evaluation.generation import answer_inputs
from deal_core.evaluation.likelihood import measure
from deal_core.method_config import SelectionConfig
from deal_core.selection import score_class
from deal_core.selection.score import Candidates

TRAIN = TrainConfig(max_prompt_tokens=64)
LIMITS = {"max_prompt_tokens": TRAIN.max_prompt_tokens, "max_answer_tokens": TRAIN.max_answer_tokens}


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
    torch.testing.assert_close(found.failure_rate, 1 - (-found.loss_N).exp())


def test_errors_are_the_rows_that_a_generated_answer_gets_wrong(base, half_learned, task, rows):
    data = rows(60)
    config = SelectionConfig(keep=0.5, score="errors")
    with adapter_on(base.model, half_learned) as model:
        measured = measure(model, base.tokenizer, task, data, **LIMITS)
        given = answer_inputs(model, base.tokenizer, task, data["input"], EvaluateConfig(), max_prompt_tokens=64)
    score = score_class("errors")().score(Candidates(rows=data, task=task, measured=measured, config=config, seed=0))
    is_wrong = [answer.text != label for answer, label in zip(given, data["output"], strict=True)]
    assert 0 < sum(is_wrong) < 60, "the parent answers some rows rightly and some wrongly"
    # a wrong row scores above 1, a right one at most 1
    disagreeing = [row for row, wrong in enumerate(is_wrong) if wrong != (float(score[row]) > 1)]
    assert len(disagreeing) <= 1


def test_the_gradient_is_that_of_the_mean_loss(base, half_learned, task, rows):
    with adapter_on(base.model, half_learned) as model:
        measured = measure(model, base.tokenizer, task, rows(20), **LIMITS)
    candidates = Candidates(rows=rows(20), task=task, measured=measured, config=SelectionConfig(keep=5), seed=0)
    score = score_class("gradient")().score(candidates)
    torch.testing.assert_close(score * measured.num_tokens_N, measured.gradient_N)
    assert ((score >= 0) & (score <= 2**0.5)).all() and len(set(score.tolist())) > 1


def test_difficulty_is_the_rate_of_wrong_sampled_answers(base, half_learned, task, rows):
    data, num_samples = rows(6), 2000
    encoded = encode_rows(data, base.tokenizer, task, max_prompt_tokens=64, max_answer_tokens=50)
    collate, generator = AnswerCollator(base.tokenizer, is_seq2seq=False), torch.Generator().manual_seed(0)
    with adapter_on(base.model, half_learned) as model:
        measured = measure(model, base.tokenizer, task, data, **LIMITS)
        for row in range(len(data)):
            batch = collate([encoded[row]])
            with torch.no_grad():
                shares_KV = answer_logits(model, batch)[0].softmax(-1)
            # an answer is right if every token, drawn after the right ones, is right
            drawn_KS = torch.multinomial(shares_KV, num_samples, replacement=True, generator=generator)
            wrong = 1 - (drawn_KS == batch["labels"][0][:, None]).all(0).float().mean()
            d = float(measured.failure_rate[row])
            assert abs(float(wrong) - d) <= 4 * (d * (1 - d) / num_samples) ** 0.5 + 1e-3
    order = {}
    for target in (0.0, 1.0):
        config = SelectionConfig(keep=0.5, score="difficulty", target=target)
        candidates = Candidates(rows=data, task=task, measured=measured, config=config, seed=0)
        order[target] = score_class("difficulty")().score(candidates).argsort(descending=True).tolist()
    assert order[1.0] == measured.loss_N.argsort(descending=True).tolist() == order[0.0][::-1]
