"""Strategies through the real training loop: what the first task is, what later ones reduce to, what moves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy

from deal_core.config import AdapterConfig, TrainConfig
from deal_core.data.collate import AnswerCollator, encode_rows
from deal_core.data.order import BucketSampler
from deal_core.data.schema import TaskSchema
from deal_core.errors import ConfigError
from deal_core.method_config import DealConfig, MethodConfig
from deal_core.strategies import make_strategy
from tests.deal_configs import deal_with
from tests.unit.deal_core.conftest import at_night, same_weights, weights

OLD = TaskSchema(name="sizes", labels=("large", "small"), instruction="How big is it?")
EVEN = TrainConfig(schedule="constant", balance_labels=False)
STEPS = replace(EVEN, max_steps=20, batch_size=4, learning_rate=5e-3, max_prompt_tokens=64)


def plain_lora(base, task, rows, train: TrainConfig) -> dict[str, torch.Tensor]:
    """A training loop with only torch and PEFT: full logits, no Trainer."""
    torch.manual_seed(train.seed)
    model = get_peft_model(
        base.model,
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    encoded = encode_rows(rows, base.tokenizer, task, max_prompt_tokens=64, max_answer_tokens=50)
    sampler = BucketSampler(encoded["length"], train.batch_size, train.seed)
    collate = AnswerCollator(base.tokenizer, is_seq2seq=False)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=train.learning_rate, weight_decay=0
    )
    done = 0
    for epoch in range(100):
        sampler.set_epoch(epoch)
        order = list(sampler)
        for start in range(0, len(order), train.batch_size):
            if done == train.max_steps:
                found = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
                model.unload()
                return found
            batch = collate([encoded[i] for i in order[start : start + train.batch_size]])
            labels = batch.pop("labels")
            logits = model(**batch).logits[:, -labels.shape[1] - 1 : -1]
            cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), train.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            done += 1
    raise AssertionError("too few steps")


def test_first_task_is_plain_lora(base, task, rows, train):
    expected = plain_lora(base, task, rows(24), STEPS)
    found = weights(train("seq_lora", train=STEPS).folder)
    assert len(found) == len(expected) == 8
    for name, value in expected.items():
        torch.testing.assert_close(found[name.replace(".default", "")], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strategy", ["deal", "replay"])
def test_first_task_equals_that_of_seq_lora_bit_for_bit(strategy, train):
    assert same_weights(*(train(each, train=STEPS).folder for each in (strategy, "seq_lora")))


def test_later_task_with_a_free_core_is_plain_lora_and_its_rehearsal(parent, train):
    free, plain, rehearsed = (
        train(name, parent, deal=DealConfig(core="free"), old_tasks=olds).folder
        for name, olds in (("deal", ()), ("seq_lora", (OLD,)), ("deal", (OLD,)))
    )
    assert same_weights(free, plain) and not same_weights(rehearsed, plain)


@pytest.mark.parametrize("change", [{"energy": 0.5}, {"lambda1": 0.5}], ids=str)
def test_a_free_core_takes_no_setting_that_would_do_nothing(change):
    with pytest.raises(ConfigError, match=rf"deal\.core is free, .* deal\.{next(iter(change))} would do nothing"):
        DealConfig(core="free", **change)


@pytest.mark.parametrize(
    "change",
    [
        {"core": "frozen"},
        {"energy": 0.5},
        {"free_share": 0.75, "energy": 1.0},
        {"seed_scale": 2.0},
        *at_night({"widths": (0.5,)}),
        {"num_layers": 0},
        {"mixing": False},
        {"lambda1": 10.0},
        {"lambda2": 10.0},
        {"lambda1": 1.0, "a": 6.0},
        {"lambda2": 10.0, "b": 1.0},
        {"lambda1": 1.0, "tolerance": 0.01},
    ],
    ids=str,
)
def test_every_setting_changes_the_result(change, parent, train, trained_once):
    start = {key: value for key, value in change.items() if key in ("lambda1", "lambda2") and len(change) > 1}
    start |= {"energy": 1.0} if "free_share" in change else {}
    default = weights(trained_once(deal=DealConfig(**start)).folder)
    changed = weights(train("deal", parent, deal=deal_with(**change)).folder)
    assert any(not torch.allclose(default[name], changed[name], rtol=1e-5, atol=1e-7) for name in default)


def test_a_later_task_is_learned_in_an_adapter_of_the_same_size(parent, train):
    before = {name: value.shape for name, value in weights(parent).items()}
    learned = train("deal", parent, train=replace(EVEN, max_steps=30, batch_size=8, learning_rate=2e-2))
    assert sum(learned.losses[-5:]) < 0.8 * sum(learned.losses[:5])
    assert {name: value.shape for name, value in weights(learned.folder).items()} == before


def test_unknown_strategy_names_the_known_ones():
    with pytest.raises(ConfigError, match="strategy is 'dael'; give deal, seq_lora"):
        make_strategy("dael", MethodConfig(), 0)


def test_rank_beyond_a_module_is_refused(train):
    with pytest.raises(ConfigError, match=r"rank 64 exceeds .* set adapter.rank to 32"):
        train("deal", adapter=AdapterConfig(rank=64))


def test_notes_say_how_full_the_adapter_is(parent, train):
    notes = train("deal", parent, deal=DealConfig(energy=1.0, free_share=0.5)).result.notes
    assert any("the adapter is full in 4 of 4 modules" in note and "% of what it had learned" in note for note in notes)
    fits = train("deal", parent, deal=DealConfig(energy=0.1, free_share=0.5)).result.notes
    assert not any("full" in note for note in fits)
    roomy = train("deal", parent, deal=DealConfig(energy=0.1)).result.notes
    assert not any("full" in note for note in roomy), "a core that leaves its share of free slots is no remark"
