"""Labels' log-probabilities: one batched pass gives what single rows give. Offsets take a preference away."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from transformers import MptConfig, MptForCausalLM

from deal_core.adapter.state import adapter_on
from deal_core.config import TrainConfig
from deal_core.data.collate import AnswerCollator, answer_logits
from deal_core.data.prompts import encode_answer, encode_prompt
from deal_core.data.schema import TaskSchema
from deal_core.evaluation import batches
from deal_core.evaluation.label_scores import PRIOR_ROWS, label_log_probs, label_offsets, offsets, recentred_accuracy
from tests.unit.deal_core.conftest import small_model

TASK = TaskSchema(name="shades", labels=("red", "dark green", "a very light blue"), instruction="Which shade is it?")
TEXTS = ["rose", "grass and moss in the rain", "sky", "the sea on a day without wind", "ice"]


def one_by_one(model, tokenizer, task: TaskSchema, *, is_seq2seq: bool) -> torch.Tensor:
    """Every row with every label as a batch of its own, as training reads them."""
    collate = AnswerCollator(tokenizer, is_seq2seq=is_seq2seq)
    found = []
    for text in TEXTS:
        prompt = encode_prompt(tokenizer, task, text, 64)
        for label in task.labels:
            answer = encode_answer(tokenizer, task, label, 64)
            inputs = collate([{"prompt_ids": prompt, "answer_ids": answer}])
            log_probs_KV = answer_logits(model, inputs)[0].float().log_softmax(-1)
            found.append(log_probs_KV.gather(-1, torch.tensor(answer)[:, None]).sum())
    return torch.stack(found).reshape(len(TEXTS), len(task.labels))


@pytest.mark.parametrize("max_batch_tokens", [64, 4096])
def test_a_decoder_gives_the_log_probabilities_of_single_rows(max_batch_tokens, base, train, monkeypatch):
    monkeypatch.setattr(batches, "MAX_BATCH_TOKENS", max_batch_tokens)
    folder = train("seq_lora", train=TrainConfig(max_steps=20, learning_rate=3e-2)).folder
    lengths = [len(encode_prompt(base.tokenizer, TASK, text, 64)) for text in TEXTS]
    num_batches = len([*batches.in_batches(base.model, lengths, len)])
    with torch.no_grad(), adapter_on(base.model, folder) as model:
        found = label_log_probs(model, base.tokenizer, TASK, TEXTS, max_prompt_tokens=64)
        expected = one_by_one(model, base.tokenizer, TASK, is_seq2seq=False)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)
    assert len(set(found.argmax(1).tolist())) > 1 or found.std() > 0.1
    assert (num_batches > 1) == (max_batch_tokens == 64)


@pytest.mark.parametrize("kind", ["positions that count padding", "a sliding window"])
@torch.no_grad()
def test_models_that_read_no_shared_prefix_give_them_too(kind, base):
    vocab_size = base.model.config.vocab_size
    torch.manual_seed(0)
    if kind == "a sliding window":
        model = small_model("mistral", vocab_size, sliding_window=12)
    else:
        model = MptForCausalLM(MptConfig(vocab_size=vocab_size, d_model=32, n_heads=2, n_layers=2)).eval()
    found = label_log_probs(model, base.tokenizer, TASK, TEXTS, max_prompt_tokens=64)
    torch.testing.assert_close(found, one_by_one(model, base.tokenizer, TASK, is_seq2seq=False), atol=1e-3, rtol=1e-4)


def scored(num_rows: int = 900, signal: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of three labels for rows that are half label 0, a third label 1 and a sixth label 2."""
    random = np.random.default_rng(0)
    targets = random.choice(3, num_rows, p=[1 / 2, 1 / 3, 1 / 6])
    scores = random.normal(size=(num_rows, 3))
    scores[np.arange(num_rows), targets] += signal
    return log_softmax(scores, axis=1), targets


def test_a_favoured_label_costs_accuracy_but_no_knowledge():
    log_probs, targets = scored()
    shifted = log_softmax(log_probs + np.array([0.0, 0.0, 4.0]), axis=1)
    assert (shifted.argmax(1) == targets).mean() < (log_probs.argmax(1) == targets).mean() - 0.3
    assert recentred_accuracy(shifted, targets) == pytest.approx(recentred_accuracy(log_probs, targets), abs=1e-3)


def test_without_signal_nothing_is_known():
    log_probs, targets = scored(signal=0.0)
    assert recentred_accuracy(log_probs, targets) == pytest.approx(1 / 4 + 1 / 9 + 1 / 36, abs=0.05)


def test_the_offsets_reach_the_shares():
    log_probs, _ = scored()
    goal = np.array([0.2, 0.2, 0.6])
    shifted = np.exp(log_softmax(log_probs + offsets(log_probs, goal), axis=1))
    assert shifted.mean(0) == pytest.approx(goal, abs=1e-4)


def test_offsets_to_answer_with_take_most_of_a_preference_away():
    log_probs, targets = scored()
    shifted = log_softmax(log_probs + np.array([0.0, 0.0, 4.0]), axis=1)
    choices = (shifted + label_offsets(shifted, targets)).argmax(1)
    assert (choices == targets).mean() == pytest.approx(recentred_accuracy(log_probs, targets), abs=0.02)


@pytest.mark.parametrize(("num_rows", "weight"), [(PRIOR_ROWS, 1 / 2), (9 * PRIOR_ROWS, 9 / 10)])
def test_few_rows_give_small_offsets(num_rows, weight):
    """A label without rows, such as one that was added, gets the mean offset."""
    log_probs, _ = scored(num_rows)
    targets = np.arange(num_rows) % 2
    found = label_offsets(log_probs, targets)
    counts = np.bincount(targets) + 1
    assert found[:2] == pytest.approx(weight * offsets(log_probs[:, :2], counts / counts.sum()))
    assert found[2] == 0 and found.sum() == pytest.approx(0)


def test_one_row_is_answered_without_offsets():
    log_probs = np.log([[0.1, 0.7, 0.2]])
    assert recentred_accuracy(log_probs, np.array([1])) == 1
    assert recentred_accuracy(log_probs, np.array([0])) == 0
