"""The defining property of each rival, checked on its results."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deal_core.adapter.state import adapter_on, load_adapter, load_method_state
from deal_core.config import AdapterConfig, TrainConfig
from deal_core.evaluation.generation import first_answer_logits
from deal_core.training.conformance import check_strategy
from tests.unit.deal_core.conftest import at_night, train_into

pytestmark = pytest.mark.nightly

LONG = TrainConfig(max_steps=12, batch_size=4, learning_rate=1e-2, max_prompt_tokens=64, checkpoint_steps=0)
STILL = TrainConfig(max_steps=1, batch_size=4, learning_rate=1e-12, max_prompt_tokens=64, checkpoint_steps=0)
WIDENING = ["inc_lora", "o_lora", "ella"]
ALL = ["deal_literal", "ewc", "lwf", "slao", *WIDENING]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def a_names(found: dict[str, torch.Tensor]) -> list[str]:
    return sorted(name for name in found if ".lora_A." in name)


def distance(first: Path, second: Path) -> float:
    one, other = weights(first), weights(second)
    return sum(float((one[name] - other[name]).square().sum()) for name in one) ** 0.5


@pytest.fixture(scope="module")
def plain_lora(loaded_base, tmp_path_factory):
    """Folder of an adapter that has learned one task as plain LoRA."""
    return train_into(tmp_path_factory.mktemp("plain"), copy.deepcopy(loaded_base), "seq_lora", train=LONG).folder


@pytest.mark.parametrize("strategy", ["ewc", "lwf", *at_night("deal_literal", "inc_lora", "o_lora", "ella", "slao")])
def test_rivals_keep_the_promises_of_strategies(strategy: str, tmp_path: Path) -> None:
    check_strategy(strategy, tmp_path)


@pytest.mark.parametrize("strategy", ALL)
def test_first_task_is_plain_lora(strategy, train, plain_lora):
    ours, plain = weights(train(strategy, train=LONG).folder), weights(plain_lora)
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


@pytest.mark.parametrize("strategy", WIDENING)
def test_earlier_slots_stay_and_new_ones_are_added(strategy, train, parent):
    before, after = weights(parent), weights(train(strategy, parent, train=LONG).folder)
    for name in a_names(before):
        other = name.replace("lora_A", "lora_B")
        assert torch.equal(after[name][:4], before[name]) and after[name].shape[0] == 8
        assert torch.equal(after[other][:, :4], before[other])
        assert after[other][:, 4:].abs().max() > 1e-4


def test_every_arrival_draws_seeds_of_its_own(train, parent):
    """With equal seeds, a new adapter would read the directions of the one before, and a recycled slot the core's."""
    second = train("inc_lora", parent, train=STILL).folder
    third = weights(train("inc_lora", second, train=STILL).folder)
    for name in a_names(third):
        first_A, second_A, third_A = third[name].split(4)
        scale = second_A.norm() * third_A.norm()
        assert (second_A * third_A).sum().abs() < 0.5 * scale > (first_A * second_A).sum().abs()
    second = train("deal", parent, train=STILL).folder
    third = train("deal", second, train=STILL).folder
    assert distance(second, third) > 0.1 * distance(parent, third)


@pytest.mark.parametrize("rslora", [False, True])
def test_new_slots_change_nothing_before_they_are_trained(base, task, train, rslora):
    parent = train("seq_lora", adapter=AdapterConfig(rank=4, rslora=rslora), train=LONG).folder
    with adapter_on(base.model, parent) as model:
        expected = first_answer_logits(model, base.tokenizer, task, "the sea", max_prompt_tokens=64)
    widened = load_adapter(base.model, parent, num_new_slots=4)
    found = first_answer_logits(widened, base.tokenizer, task, "the sea", max_prompt_tokens=64)
    torch.testing.assert_close(found, expected)


def overlap(folder: Path) -> float:
    return sum(float((a[:4] @ a[4:].mT).abs().sum()) for n, a in weights(folder).items() if ".lora_A." in n)


def test_o_lora_reads_directions_orthogonal_to_the_earlier_ones(train, parent):
    free = train("o_lora", parent, train=LONG, strategy_options={"weight": 0.0}).folder
    held = train("o_lora", parent, train=LONG, strategy_options={"weight": 0.5}).folder
    assert overlap(held) < 0.5 * overlap(free)
    plain = train("inc_lora", parent, train=LONG).folder
    assert distance(free, plain) == 0


def test_ella_keeps_out_of_where_the_past_is_large(train, parent):
    def overlap_of_updates(folder: Path) -> float:
        found, total = weights(folder), 0.0
        for name in a_names(found):
            a, b = found[name], found[name.replace("lora_A", "lora_B")]
            total += float(((b[:, :4] @ a[:4]) * (b[:, 4:] @ a[4:])).square().sum())
        return total

    free = train("ella", parent, train=LONG, strategy_options={"weight": 0.0}).folder
    held = train("ella", parent, train=LONG, strategy_options={"weight": 1e4}).folder
    assert overlap_of_updates(held) < 0.1 * overlap_of_updates(free)


def test_ewc_holds_what_mattered(train):
    first = train("ewc", train=LONG).folder
    free = train("ewc", first, train=LONG, strategy_options={"weight": 0.0}).folder
    held = train("ewc", first, train=LONG, strategy_options={"weight": 1e4}).folder
    fisher = load_method_state(first).tensors

    def moved(folder: Path) -> float:
        start, end = weights(first), weights(folder)
        pairs = [(fisher[name.replace(".weight", ".default.weight")], end[name] - start[name]) for name in start]
        return sum(float((information * change**2).sum()) for information, change in pairs)

    assert moved(held) < 0.2 * moved(free)
    assert all(bool((value >= 0).all()) for value in fisher.values())


def test_lwf_holds_the_answers_of_the_parent(base, task, train, parent, rows):
    def drift(weight: float) -> float:
        folder = train("lwf", parent, train=LONG, strategy_options={"weight": weight}).folder
        shares = []
        for where in (parent, folder):
            with adapter_on(base.model, where) as model:
                logits = [
                    first_answer_logits(model, base.tokenizer, task, row["input"], max_prompt_tokens=64)
                    for row in rows(6)
                ]
            shares.append(torch.stack(logits).log_softmax(-1))
        return float((shares[0].exp() * (shares[0] - shares[1])).sum())

    assert drift(20.0) < 0.5 * drift(0.0)


def test_slao_starts_from_an_orthonormal_basis_of_the_last_a(train, parent):
    first = train("slao", train=LONG).folder
    second = train("slao", first, train=STILL).folder
    before, after = weights(first), weights(second)
    for name in a_names(before):
        a = after[name]
        torch.testing.assert_close(a @ a.mT, torch.eye(4), rtol=0, atol=1e-5)
        torch.testing.assert_close(before[name] @ a.mT @ a, before[name], rtol=0, atol=1e-5)  # the same row space
    assert load_method_state(second).num_arrivals == 2


def test_slao_averages_b_over_the_tasks(train):
    first = train("slao", train=LONG).folder
    second = train("slao", first, train=LONG).folder
    third = train("slao", second, train=LONG).folder
    for folder, before, number in ((second, first, 2), (third, second, 3)):
        own = load_method_state(folder).tensors
        stacked = [own[name] for name in sorted(own) if name.startswith("b.")]
        merged, start = weights(folder), weights(before)
        names = [name for name in merged if ".lora_B." in name]
        unmerged = {value.shape[1:]: list(value) for value in stacked}
        for name in names:
            b = unmerged[merged[name].shape].pop(0)
            expected = start[name] + (b - start[name]) / number**0.5
            torch.testing.assert_close(merged[name], expected, rtol=1e-5, atol=1e-6)


CHANGES = [
    ("replay", "slao"),
    ("slao", "slao"),
    ("slao", "ewc"),
    ("ewc", "ewc"),
    ("ewc", "deal"),
    ("deal", "o_lora"),
    ("replay", "deal"),
    ("deal", "ewc"),
]


@pytest.mark.parametrize(("before", "strategy"), CHANGES)
def test_a_lineage_may_go_on_with_another_strategy(before, strategy, train):
    first = train(before).folder
    second = train(strategy, first)
    assert load_method_state(second.folder).num_arrivals == 2
    lost = [note for note in second.result.notes if "gone" in note]
    keep_rows = ("replay", "deal")
    assert bool(lost) == (strategy not in keep_rows if before in keep_rows else strategy != before)
