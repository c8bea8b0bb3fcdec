"""XGBLoRA: what a booster changes, what a merge keeps, where the optimiser begins again, what a resume repeats."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from deal_core.adapter.files import WEIGHTS_FILE
from deal_core.base_model.load import load_base
from deal_core.config import AdapterConfig, TrainConfig
from deal_core.errors import ConfigError
from deal_core.method_config import RivalConfig
from deal_core.strategies.xgb_lora import XgbLora, layer_of

NUM_LAYERS = 5
STEPS = TrainConfig(
    max_steps=8, batch_size=4, learning_rate=1e-2, max_prompt_tokens=64, checkpoint_steps=0, schedule="constant"
)
WIDE = AdapterConfig(rank=8)


@pytest.fixture
def base(tiny_base, tmp_path):
    """The tiny base with more layers, so that a share of them is more than one."""
    folder = tmp_path / "layers"
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(tiny_base, num_hidden_layers=NUM_LAYERS)
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(folder)
    return load_base(str(folder), tmp_path / "cache", precision="fp32")


def boosted(boosters: int, share: float = 1.0) -> RivalConfig:
    return RivalConfig(xgb_boosters=boosters, xgb_layer_share=share)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS_FILE)


def updates(folder: Path) -> dict[str, torch.Tensor]:
    """B·A by the name of the module."""
    found = weights(folder)
    names = [name for name in found if ".lora_A." in name]
    return {name.split(".lora_A")[0]: found[name.replace("lora_A", "lora_B")] @ found[name] for name in names}


def products(strategy: XgbLora) -> dict[str, torch.Tensor]:
    """b·a of the booster by the name of the module."""
    return {
        name: (b @ a).detach().clone()
        for stack, many_a, many_b in zip(strategy.stacks, strategy.a_new, strategy.b_new, strict=True)
        for name, a, b in zip(stack.names, many_a, many_b, strict=True)
    }


@pytest.fixture
def trained_boosters(monkeypatch):
    """Every booster's product, taken when the booster is merged or the arrival ends."""
    found: list[dict[str, torch.Tensor]] = []
    merge, finish = XgbLora._merge, XgbLora.finish

    def noted_merge(self):
        if self.step:
            found.append(products(self))
        merge(self)

    def noted_finish(self):
        found.append(products(self))
        return finish(self)

    monkeypatch.setattr(XgbLora, "_merge", noted_merge)
    monkeypatch.setattr(XgbLora, "finish", noted_finish)
    return found


def test_one_booster_adds_one_direction_to_every_module(train):
    first = train("xgblora", train=STEPS, rivals=boosted(2))
    second = train("xgblora", first.folder, train=STEPS, rivals=boosted(1))
    before = updates(first.folder)
    for name, after in updates(second.folder).items():
        sigma = torch.linalg.svdvals(after - before[name])
        assert sigma[1] < 1e-4 * sigma[0] and sigma[0] > 1e-3
    assert "boosters of rank 1: 1, up to 8 steps each, in 5 of 5 layers" in second.result.notes[0]


def test_with_enough_slots_the_adapter_is_the_sum_of_the_boosters(train, trained_boosters):
    first = train("xgblora", train=STEPS, rivals=boosted(2), adapter=WIDE)
    trained_boosters.clear()
    second = train("xgblora", first.folder, train=STEPS, rivals=boosted(4), adapter=WIDE)
    assert len(trained_boosters) == 4
    before, after = updates(first.folder), updates(second.folder)
    for name in after:
        module = name.removeprefix("base_model.model.")
        added = sum(each[module] for each in trained_boosters)
        torch.testing.assert_close(after[name], before[name] + added, rtol=0, atol=1e-5)
        assert added.norm() > 1e-2
    assert "left out 0.00%" in second.result.notes[0]


def test_merges_keep_the_largest_directions_and_say_what_they_lost(train, trained_boosters):
    """Rank 2 has one slot for what is merged."""
    run = train("xgblora", train=STEPS, rivals=boosted(2), adapter=AdapterConfig(rank=2))
    again = train("xgblora", run.folder, train=replace(STEPS, max_steps=1), rivals=boosted(1))
    for name, after in updates(run.folder).items():
        module = name.removeprefix("base_model.model.")
        torch.testing.assert_close(after, trained_boosters[0][module] + trained_boosters[1][module], rtol=0, atol=1e-5)
    sigmas = torch.stack([torch.linalg.svdvals(each)[:2].double() for each in updates(run.folder).values()])
    lost = float(sigmas[:, 1].square().sum() / sigmas.square().sum())
    assert lost > 0.01 and f"left out {lost:.2%} of the adapter's squared norm" in again.result.notes[0]


def test_a_booster_changes_exactly_its_share_of_the_layers(train, monkeypatch):
    seen: list[dict[str, torch.Tensor]] = []
    merge = XgbLora._merge

    def noted(self):
        seen.append({name: b @ a for stack in self.stacks
                     for name, a, b in zip(stack.names, *stack.read(), strict=True)})  # fmt: skip
        merge(self)

    monkeypatch.setattr(XgbLora, "_merge", noted)
    run = train("xgblora", train=STEPS, rivals=boosted(4, share=0.4), adapter=WIDE)
    seen.append({name.removeprefix("base_model.model."): value for name, value in updates(run.folder).items()})
    drawn = []
    for before, after in itertools.pairwise(seen):
        moved = [layer_of(name) for name in after if (after[name] - before[name]).norm() > 1e-4]
        still = [name for name in after if layer_of(name) not in moved]
        assert len(set(moved)) == 2 and len(moved) == 2 * len(set(moved))  # the query and value modules of two layers
        for name in still:
            torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-6)
        drawn.append(frozenset(moved))
    assert len(drawn) == 4 and len(set(drawn)) > 1


def test_every_arrival_and_every_booster_draws_a_of_its_own(train, monkeypatch):
    begun: list[torch.Tensor] = []
    begin = XgbLora._begin_booster

    def noted(self, number):
        begin(self, number)
        begun.append(self.a_new[0].detach().clone().flatten())

    monkeypatch.setattr(XgbLora, "_begin_booster", noted)
    first = train("xgblora", train=STEPS, rivals=boosted(2)).folder
    train("xgblora", first, train=STEPS, rivals=boosted(2))
    alike = torch.nn.functional.normalize(torch.stack(begun))
    assert len(begun) == 4 and (alike @ alike.mT - torch.eye(4)).abs().max() < 0.5


def test_a_booster_starts_with_a_fresh_optimiser(train):
    """AdamW's first step moves every number by the rate, and a_t not at all, since b_t is zero."""
    run = train("xgblora", train=replace(STEPS, max_steps=3, max_grad_norm=0), rivals=boosted(2))
    for name, value in weights(run.folder).items():
        if ".lora_B." in name:
            last = value[:, -1].abs()
            torch.testing.assert_close(last, torch.full_like(last, STEPS.learning_rate), rtol=1e-2, atol=0)
        else:
            assert value[-1].abs().max() <= value.shape[1] ** -0.5


@pytest.mark.parametrize(("last", "resumed_from"), [(5, 4), (7, 6)], ids=["at a merge", "between two merges"])
def test_a_killed_run_ends_with_the_same_bytes(last, resumed_from, train, killed_and_resumed):
    first = train("xgblora", train=STEPS, rivals=boosted(2, 0.4)).folder
    steps = replace(STEPS, checkpoint_steps=2)
    whole = train("xgblora", first, train=steps, rivals=boosted(2, 0.4))
    resumed = killed_and_resumed("xgblora", first, at=last, train=steps, rivals=boosted(2, 0.4))
    assert resumed.result.resumed_from_step == resumed_from
    assert (resumed.folder / WEIGHTS_FILE).read_bytes() == (whole.folder / WEIGHTS_FILE).read_bytes()
    assert resumed.result.notes == whole.result.notes


def test_the_adapter_keeps_its_shape_even_if_it_has_more_slots_than_a_module_features(train):
    """A lineage of a growing strategy goes on with boosters: v_proj has 16 outputs, the adapter then 32 slots."""
    first = train("inc_lora", train=STEPS, adapter=AdapterConfig(rank=16)).folder
    second = train("inc_lora", first, train=STEPS, adapter=AdapterConfig(rank=16)).folder
    third = train("xgblora", second, train=STEPS).folder
    shapes = [{name: value.shape for name, value in weights(folder).items()} for folder in (second, third)]
    assert shapes[0] == shapes[1]
    before = updates(second)
    assert all((value - before[name]).norm() < 0.5 * before[name].norm() for name, value in updates(third).items())


def test_more_boosters_than_steps_are_as_many_as_steps(train):
    run = train("xgblora", train=replace(STEPS, max_steps=3), rivals=boosted(8))
    assert "boosters of rank 1: 3, up to 1 steps each" in run.result.notes[0]


def test_every_task_is_learned(train):
    quick = replace(STEPS, max_steps=30, batch_size=8, learning_rate=2e-2)
    first = train("xgblora", train=quick, rivals=boosted(2))
    second = train("xgblora", first.folder, train=quick, rivals=boosted(2))
    for losses in (first.losses, second.losses):
        assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


@pytest.mark.parametrize(
    ("name", "layer"),
    [("model.layers.3.self_attn.q_proj", "model.layers.3"), ("encoder.block.0.layer.1.wi", "encoder.block.0"),
     ("decoder.block.0.layer.1.wi", "decoder.block.0"), ("lm_head", "lm_head")],
)  # fmt: skip
def test_a_module_s_layer_is_its_name_up_to_the_first_number(name, layer):
    assert layer_of(name) == layer


@pytest.mark.parametrize("change", [{"xgb_boosters": 0}, {"xgb_layer_share": 0.0}, {"xgb_layer_share": 1.5}], ids=str)
def test_settings_without_a_meaning_are_refused(change):
    with pytest.raises(ConfigError, match=rf"rivals\.{next(iter(change))} is "):
        RivalConfig(**change)
