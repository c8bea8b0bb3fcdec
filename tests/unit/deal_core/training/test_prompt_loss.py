"""Training on the texts of prompts too: which tokens count, and how much."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from deal_core.adapter.state import attach_adapter
from deal_core.config import AdapterConfig, TrainConfig
from deal_core.data.collate import (
    IGNORED,
    AnswerCollator,
    add_blank_row,
    add_text_spans,
    answer_and_text_loss,
    answer_loss,
    encode_rows,
    share_of_texts,
)
from deal_core.planning.memory import limits_of

SHORT = TrainConfig(
    max_steps=4, batch_size=8, learning_rate=5e-3, max_prompt_tokens=64, group_by_length=False, prompt_loss_weight=0.3
)


@pytest.fixture
def encoded(base, task, rows):
    made = encode_rows(rows(7), base.tokenizer, task, max_prompt_tokens=64, max_answer_tokens=8)
    return add_text_spans(made)


def test_what_all_prompts_share_does_not_count(base, task, rows, encoded):
    for row, given in zip(encoded, rows(7), strict=True):
        start, end, ids = row["text_start"], row["text_end"], row["prompt_ids"]
        counted = base.tokenizer.decode(ids[start:end])
        assert counted.strip() in given["input"] and len(counted) >= len(given["input"]) - len("message ")
        assert task.instruction in base.tokenizer.decode(ids[:start])
        assert base.tokenizer.decode(ids[end:]).strip(), "what the template has after the text"


@pytest.mark.parametrize("num_rows", [1, 3])
def test_equal_prompts_have_no_text_that_counts(base, task, rows, num_rows):
    again = rows(1).select([0] * num_rows)
    made = add_text_spans(encode_rows(again, base.tokenizer, task, max_prompt_tokens=64, max_answer_tokens=8))
    assert made["text_start"] == made["text_end"] and share_of_texts(made, 1.0) == 0


@pytest.mark.parametrize("shares_prefix", [False, True])
def test_losses_are_those_of_whole_rows_token_by_token(base, encoded, shares_prefix):
    collate = AnswerCollator(base.tokenizer, is_seq2seq=False, shares_prefix=shares_prefix, scores_texts=True)
    batch = collate(list(encoded))
    assert ("prefix_ids" in batch) == shares_prefix
    with torch.no_grad():
        answers, texts = answer_and_text_loss(base.model, batch)
        expected_answers = expected_texts = torch.zeros(())
        for row in encoded:
            ids = torch.tensor([row["prompt_ids"] + row["answer_ids"]])
            losses_T = cross_entropy(base.model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
            num_prompt = len(row["prompt_ids"])
            expected_answers = expected_answers + losses_T[num_prompt - 1 :].sum()
            expected_texts = expected_texts + losses_T[row["text_start"] - 1 : row["text_end"] - 1].sum()
    torch.testing.assert_close((answers, texts), (expected_answers, expected_texts), rtol=1e-4, atol=1e-4)
    assert texts > answers > 0


def test_a_blank_row_adds_nothing(base, encoded):
    collate = AnswerCollator(base.tokenizer, is_seq2seq=False, scores_texts=True)
    blank = collate(list(add_blank_row(encoded))[-1:])
    assert not blank["labels"].ne(IGNORED).any() and not blank["text_labels"].ne(IGNORED).any()
    assert answer_and_text_loss(base.model, blank) == (0, 0)


def test_the_first_steps_loss_is_the_weighted_mean(base, train, task, rows):
    """Of one batch with all rows, before anything is learned."""
    found = train("seq_lora", rows=rows(7), train=replace(SHORT, max_steps=1))
    made = encode_rows(rows(7), base.tokenizer, task, max_prompt_tokens=64, max_answer_tokens=8)
    batch = AnswerCollator(base.tokenizer, is_seq2seq=False, scores_texts=True)(list(add_text_spans(made)))
    with torch.no_grad():
        answers, texts = map(float, answer_and_text_loss(base.model, batch))
    num_answers, num_texts = (int(batch[name].ne(IGNORED).sum()) for name in ("labels", "text_labels"))
    assert found.losses == [pytest.approx((answers + 0.3 * texts) / (num_answers + 0.3 * num_texts), rel=1e-4)]
    share = round(100 * 0.3 * num_texts / (num_answers + 0.3 * num_texts))
    assert found.result.notes[-1] == f"train.prompt_loss_weight 0.3: the texts have {share}% of the loss's weight"


def test_micro_batches_equal_one_large_batch(parent, train):
    whole = train("deal", parent, train=SHORT)
    split = train("deal", parent, train=replace(SHORT, batch_size=2, gradient_accumulation_steps=4))
    assert whole.losses == pytest.approx(split.losses, rel=1e-4)
    for name, value in load_file(whole.folder / "adapter_model.safetensors").items():
        other = load_file(split.folder / "adapter_model.safetensors")[name]
        torch.testing.assert_close(other, value, rtol=1e-3, atol=1e-5)


def test_without_a_weight_the_gradient_is_that_of_the_answers(base, encoded):
    model = attach_adapter(base.model, AdapterConfig(rank=4), seed=0)
    batch = AnswerCollator(base.tokenizer, is_seq2seq=False, scores_texts=True)(list(encoded))
    answers, _ = answer_and_text_loss(model, batch)
    torch.testing.assert_close(answers, answer_loss(model, batch))
    model.unload()


def test_a_stored_setting_of_zero_changes_no_digest():
    assert "prompt_loss_weight" not in TrainConfig().deciding()
    assert SHORT.deciding()["prompt_loss_weight"] == 0.3


def test_a_plan_counts_the_logits_of_the_texts():
    assert limits_of(SHORT, 8).num_scored_tokens == 64 + 50 - 1
    assert limits_of(TrainConfig(), 8).num_scored_tokens == 50
