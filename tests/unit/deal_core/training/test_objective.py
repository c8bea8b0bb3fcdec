"""Preferences (DPO): the loss, its reference, what is learned, and how versions are judged by it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy, logsigmoid

from deal_core.adapter.state import adapter_on
from deal_core.config import TrainConfig
from deal_core.data.collate import REFERENCE_MARGINS, AnswerCollator, add_blank_row, answer_logits, encode_rows
from deal_core.evaluation.evaluate import evaluate_task
from deal_core.planning.memory import largest_batch
from deal_core.training.objective import (
    PairCollator,
    PreferenceLoss,
    add_preferences,
    margins,
)
from tests.unit.deal_core.conftest import TONE, as_served, at_night, pairs, same_weights

SHORT = TrainConfig(
    max_steps=6,
    batch_size=4,
    preference_learning_rate=1e-2,
    schedule="constant",
    max_prompt_tokens=64,
    max_answer_tokens=20,
)


@pytest.fixture
def encoded(base):
    rows = pairs(7)
    made = encode_rows(rows, base.tokenizer, TONE, max_prompt_tokens=64, max_answer_tokens=20)
    return add_preferences(made, rows, base.model, base.tokenizer, TONE, SHORT)


def with_margins(encoded: Dataset, margins_N: list[float]) -> Dataset:
    return encoded.remove_columns(REFERENCE_MARGINS).add_column(REFERENCE_MARGINS, margins_N)


def log_p(model, row, name: str) -> torch.Tensor:
    """Log-probability of an answer, of one row alone."""
    ids = torch.tensor([row["prompt_ids"] + row[name]])
    losses_T = cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
    return -losses_T[len(row["prompt_ids"]) - 1 :].sum()


@pytest.mark.parametrize("shares_prefix", [False, True])
def test_margins_and_loss_are_those_of_rows_read_alone(base, encoded, shares_prefix):
    collate = PairCollator(AnswerCollator(base.tokenizer, is_seq2seq=False, shares_prefix=shares_prefix))
    reference_N = [0.5 * number for number in range(len(encoded))]
    batch = collate(list(with_margins(encoded, reference_N)))
    assert ("prefix_ids" in batch) == shares_prefix
    with torch.no_grad():
        better_N, worse_N = (
            torch.stack([log_p(base.model, row, name) for row in encoded]) for name in ("answer_ids", "rejected_ids")
        )
        alone_N = better_N - worse_N
        logits_CKV = answer_logits(base.model, batch)
        torch.testing.assert_close(margins(logits_CKV, batch["labels"]), alone_N, rtol=1e-4, atol=1e-4)
        loss = PreferenceLoss(beta=0.3).loss_sum(logits_CKV, batch)
    expected = -logsigmoid(0.3 * (alone_N - torch.tensor(reference_N))).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    assert PreferenceLoss(beta=0.3).weight([batch, batch]) == 2 * len(encoded)


def test_a_blank_row_adds_nothing(base, encoded):
    collate = PairCollator(AnswerCollator(base.tokenizer, is_seq2seq=False))
    rows = list(add_blank_row(encoded))
    objective = PreferenceLoss(beta=0.3)
    with torch.no_grad():
        with_blank, without = (
            objective.loss_sum(answer_logits(base.model, batch), batch) for batch in (collate(rows), collate(rows[:-1]))
        )
    torch.testing.assert_close(with_blank, without)
    assert objective.weight([collate(rows[-1:])]) == 0


@pytest.mark.parametrize("has_parent", [False, True])
def test_the_parent_is_the_reference(train, parent, has_parent):
    """The loss of the first step is log 2: nothing differs from the parent yet, whatever the parent prefers."""
    config = replace(SHORT, max_steps=2)
    found = train("seq_lora", parent if has_parent else None, rows=pairs(8), task=TONE, train=config)
    assert found.losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert found.losses[1] < found.losses[0]


@pytest.mark.parametrize("strategy", ["deal", *at_night("seq_lora")])
def test_preferences_are_learned_and_judged(base, train, parent, strategy):
    found = train(strategy, parent, rows=pairs(8), task=TONE, train=replace(SHORT, max_steps=16))
    assert found.losses[-1] < 0.5 * math.log(2)
    assert any(note.startswith("preferences (DPO): before, the better answer") for note in found.result.notes)

    def judge(folder):
        with adapter_on(base.model, folder) as model:
            return evaluate_task(model, base.tokenizer, as_served(TONE, 20), pairs(8))

    assert judge(found.folder).outcomes == (1.0,) * 8
    assert judge(found.folder).answers == ("1.0",) * 8 and judge(found.folder).majority_rate is None
    assert judge(None).outcomes == (0.5,) * 8, "the base model is the reference"
    with adapter_on(base.model, found.folder) as model:
        swapped = pairs(8).rename_columns({"output": "rejected", "rejected": "output"})
        assert evaluate_task(model, base.tokenizer, as_served(TONE, 20), swapped).accuracy == 0


def test_a_larger_beta_stays_nearer_to_the_parent(base, train, encoded):
    def gain(beta: float) -> float:
        config = replace(SHORT, max_steps=30, preference_beta=beta)
        found = train("seq_lora", rows=pairs(8), task=TONE, train=config)
        with adapter_on(base.model, found.folder) as model, torch.no_grad():
            rows = list(with_margins(encoded, [0.0] * len(encoded)))
            batch = PairCollator(AnswerCollator(base.tokenizer, is_seq2seq=False))(rows)
            return float(margins(answer_logits(model, batch), batch["labels"]).mean())

    assert gain(5.0) < gain(0.05)


def test_a_killed_training_ends_as_one_that_was_not(train, parent, killed_and_resumed):
    given = {"rows": pairs(8), "task": TONE, "train": replace(SHORT, checkpoint_steps=2)}
    whole, again = train("deal", parent, **given), killed_and_resumed("deal", parent, at=4, **given)
    assert again.result.resumed_from_step == 2 and same_weights(whole.folder, again.folder)


def test_cut_answers_that_have_become_equal_are_named(train):
    long = "a " * 30
    rows = Dataset.from_list([{"input": f"q {i}", "output": f"{long}b", "rejected": f"{long}c"} for i in range(4)])
    found = train("seq_lora", rows=rows, task=TONE, train=replace(SHORT, max_steps=1, max_answer_tokens=8))
    assert any("in 4 rows both are the same up to train.max_answer_tokens" in note for note in found.result.notes)


def test_a_plan_counts_both_answers():
    assert largest_batch(SHORT, rehearsed_per_step=0, on_cpu=True, learns_preferences=True) == 8
    assert largest_batch(SHORT, rehearsed_per_step=0, on_cpu=True) == 4
