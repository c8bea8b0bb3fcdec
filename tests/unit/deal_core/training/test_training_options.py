"""Options of a training: each changes what is learned, and a default follows the base model or the task."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import Dataset

from deal_core import config as settings
from deal_core.adapter.files import CONFIG_FILE
from deal_core.adapter.state import attach_adapter, load_adapter
from deal_core.base_model.load import BaseModel
from deal_core.config import AdapterConfig, TrainConfig
from deal_core.data.schema import TaskSchema
from deal_core.judging_config import MonitorConfig
from tests.unit.deal_core.conftest import Train, at_night, same_weights, weights

STEPS = TrainConfig(max_steps=4, batch_size=4, learning_rate=5e-3, max_prompt_tokens=64, checkpoint_steps=2)


def test_a_rate_that_is_not_given_follows_the_size_of_the_base_model() -> None:
    sizes = {135e6: 1e-3, 1e9: 1e-3, 1.2e9: 5e-4, 4e9: 5e-4, 8e9: 2e-4}
    assert {size: TrainConfig().rate(int(size)) for size in sizes} == sizes
    assert TrainConfig(learning_rate=0.02).rate(135_000_000) == 0.02


def test_a_training_takes_the_rate_of_its_base_model(
    base: BaseModel, parent: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = train("seq_lora", parent, train=replace(STEPS, learning_rate=0.01)).folder
    monkeypatch.setattr(settings, "RATES", ((base.model.num_parameters(), 0.01),))
    assert same_weights(given, train("seq_lora", parent, train=replace(STEPS, learning_rate=None)).folder)


def test_a_free_answer_is_learned_beyond_the_length_of_labels(train: Train) -> None:
    task = TaskSchema(name="stories", format="completion", metric="rouge_l", instruction="Tell it.")
    rows = Dataset.from_list([{"input": f"number {i}", "output": "red and green " * 30} for i in range(8)])
    assert not any("were cut" in note for note in train("seq_lora", rows=rows, task=task, train=STEPS).result.notes)
    short = train("seq_lora", rows=rows, task=task, train=replace(STEPS, max_answer_tokens=50)).result.notes
    assert any("8 of 8 training answers fill train.max_answer_tokens (50)" in note for note in short)


def test_dropout_is_kept_by_the_next_version_and_a_resumed_run_draws_the_same(
    base: BaseModel, train: Train, killed_and_resumed: Train
) -> None:
    adapter = AdapterConfig(rank=4, dropout=0.3)
    plain, first = (train("deal", adapter=shape, train=STEPS).folder for shape in (AdapterConfig(rank=4), adapter))
    assert not same_weights(plain, first)
    model = load_adapter(base.model, first, is_trainable=True)
    assert model.peft_config["default"].lora_dropout == 0.3
    model.unload()
    whole = train("deal", first, adapter=adapter, train=STEPS)
    resumed = killed_and_resumed("deal", first, at=3, adapter=adapter, train=STEPS)
    assert resumed.result.resumed_from_step == 2
    assert same_weights(whole.folder, resumed.folder)


@pytest.mark.parametrize("strategy", ["deal", *at_night("seq_lora")])
def test_a_scale_by_the_root_of_the_rank_trains_as_the_same_scale_by_the_rank(strategy: str, train: Train) -> None:
    plain, rslora = AdapterConfig(rank=4, alpha=8), AdapterConfig(rank=4, alpha=4, rslora=True)
    assert plain.scale == rslora.scale == 2
    found = []
    for adapter in (plain, rslora):
        first = train(strategy, adapter=adapter, train=STEPS).folder
        found.append(train(strategy, first, adapter=adapter, train=STEPS).folder)
    assert same_weights(*found)
    configs = [json.loads((folder / CONFIG_FILE).read_text()) for folder in found]
    assert [(config["lora_alpha"], config["use_rslora"]) for config in configs] == [(8, False), (4, True)]


def test_the_default_scale_of_rslora_falls_with_the_root_of_the_rank() -> None:
    assert [AdapterConfig(rank=rank).scale for rank in (4, 16, 64)] == [2, 2, 2]
    assert [AdapterConfig(rank=rank, rslora=True).scale for rank in (4, 16, 64)] == [4, 2, 1]


def test_all_linear_layers_but_the_last_carry_the_adapter(base: BaseModel, train: Train) -> None:
    model = attach_adapter(base.model, AdapterConfig(rank=4, target_modules="all-linear"), seed=0)
    carrying = {name.split(".")[-4] for name, _ in model.named_parameters() if ".lora_A." in name}
    assert carrying == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    model.unload()
    adapter = AdapterConfig(rank=4, target_modules="all-linear")
    first = train("deal", adapter=adapter, train=STEPS).folder
    second = train("deal", first, adapter=adapter, train=STEPS).folder
    assert weights(first).keys() == weights(second).keys() and any("down_proj" in name for name in weights(second))


def test_a_higher_sensitivity_counts_smaller_differences() -> None:
    low, normal, high = (MonitorConfig(sensitivity=level).limits for level in ("low", "normal", "high"))
    for name in ("min_psi", "min_distance", "min_auc", "max_live_drop_points"):
        assert getattr(low, name) > getattr(normal, name) > getattr(high, name)
    assert low.alpha == normal.alpha == high.alpha, "false alarms are as rare with each"
