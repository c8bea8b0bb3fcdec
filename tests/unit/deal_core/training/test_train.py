"""The training loop: settings, resume, answer-only loss, and what is written."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from deal_core.adapter.files import MethodState
from deal_core.adapter.state import adapter_on, attach_adapter, load_adapter, load_method_state, save_adapter
from deal_core.config import AdapterConfig, TrainConfig
from deal_core.data.collate import AnswerCollator, encode_rows
from deal_core.data.order import BucketSampler
from deal_core.errors import AdapterStateError, ConfigError, DataValidationError, TrainingDivergedError
from deal_core.evaluation.generation import first_answer_logits
from deal_core.method_config import DealConfig
from deal_core.strategies.kept_rows import rows_name, unpack
from deal_core.training.train import KeptSource
from tests.unit.deal_core.conftest import assert_close_weights, same_weights

SHORT = TrainConfig(max_steps=4, batch_size=4, learning_rate=5e-3, max_prompt_tokens=64)


@pytest.mark.parametrize(("strategy", "core"), [("deal", "soft"), ("deal", "free"), ("seq_lora", "free")])
@pytest.mark.parametrize("killed_at", [4, 11])
def test_interrupted_and_resumed_equals_uninterrupted(
    strategy, core, killed_at, parent, trained_once, killed_and_resumed
):
    """Six steps an epoch: the second case resumes in the second epoch."""
    config = TrainConfig(num_epochs=3, batch_size=4, learning_rate=5e-3, max_prompt_tokens=64, checkpoint_steps=3)
    deal = DealConfig(core=core)
    whole = trained_once(strategy, train=config, deal=deal)
    assert whole.result.num_steps == 18 and whole.result.resumed_from_step is None
    resumed = killed_and_resumed(strategy, parent, at=killed_at, train=config, deal=deal)
    assert resumed.result.resumed_from_step == killed_at - killed_at % 3
    assert resumed.losses == whole.losses
    assert same_weights(whole.folder, resumed.folder)


def test_a_training_that_died_after_its_last_step_takes_no_further_one_and_half_a_checkpoint_does_not_count(
    parent, train, tmp_path
):
    """Eight steps are no whole number of epochs."""
    config = TrainConfig(max_steps=8, batch_size=4, learning_rate=5e-3, schedule="constant", checkpoint_steps=2)
    given = {"train": config, "output_folder": tmp_path / "a", "checkpoint_folder": tmp_path / "c"}
    whole = train("deal", parent, **given)
    copy = shutil.copytree(whole.folder, tmp_path / "copy")
    again = train("deal", parent, **given)
    assert again.result.num_steps == whole.result.num_steps == 8 and again.losses == whole.losses
    assert same_weights(copy, again.folder)
    newest = max((tmp_path / "c").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    (newest / "COMPLETE").unlink()
    (newest / "optimizer.pt").write_bytes(b"cut")
    resumed = train("deal", parent, **given)
    assert resumed.result.resumed_from_step == int(newest.name.split("-")[1]) - 2 and resumed.losses == whole.losses


def test_checkpoints_go_by_their_steps_and_hold_no_history(parent, train, tmp_path):
    """A clock that is set back makes the newest checkpoint look the oldest."""
    folder = tmp_path / "c"

    def set_back(step, logs):
        for path in folder.glob("checkpoint-*"):
            os.utime(path, (4e9, 4e9))

    config = TrainConfig(max_steps=8, batch_size=4, learning_rate=5e-3, checkpoint_steps=2)
    train("seq_lora", parent, train=config, checkpoint_folder=folder, on_log=set_back)
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    assert json.loads((folder / "checkpoint-6" / "trainer_state.json").read_text())["log_history"] == []
    lines = (folder / "steps.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_a_training_that_diverges_ends_at_once_and_leaves_no_checkpoint(parent, train, tmp_path):
    config = TrainConfig(max_steps=40, batch_size=4, learning_rate=1e25, checkpoint_steps=1)
    with pytest.raises(TrainingDivergedError, match=r"of step \d+ is (nan|inf).*train.learning_rate \(it is 1e\+25\)"):
        train("seq_lora", parent, train=config, output_folder=tmp_path / "a", checkpoint_folder=tmp_path / "c")
    assert not (tmp_path / "a").exists() and not list(tmp_path.rglob("checkpoint-*"))


def test_prompts_and_answers_that_were_cut_are_counted(base, task, rows, train):
    assert not [note for note in train().result.notes if "train.max_" in note]
    encoded = encode_rows(rows(24), base.tokenizer, task, max_prompt_tokens=64, max_answer_tokens=8)
    lengths = [len(ids) for ids in encoded["prompt_ids"]]
    (note,) = train(train=replace(SHORT, max_prompt_tokens=max(lengths) - 1)).result.notes
    assert f"{lengths.count(max(lengths))} of 24 training prompts are longer than train.max_prompt_tokens" in note
    (note,) = train(train=replace(SHORT, max_answer_tokens=2)).result.notes
    assert "training answers fill train.max_answer_tokens (2)" in note and "cut" in note


def test_no_checkpoint_is_kept_when_none_is_wanted(train, tmp_path):
    train(train=replace(SHORT, checkpoint_steps=0), checkpoint_folder=tmp_path / "c")
    assert not list((tmp_path / "c").glob("checkpoint-*"))
    train(train=replace(SHORT, checkpoint_steps=1), checkpoint_folder=tmp_path / "c")
    assert list((tmp_path / "c").glob("checkpoint-*"))


def test_accumulated_micro_batches_equal_one_large_batch(parent, train, rows):
    """The loss is a mean over the tokens of the whole step, not a mean of means."""
    eight = rows(8)  # each step passes over all rows, whatever their order
    whole = train("deal", parent, rows=eight, train=replace(SHORT, batch_size=8))
    split = train("deal", parent, rows=eight, train=replace(SHORT, batch_size=2, gradient_accumulation_steps=4))
    assert whole.losses == pytest.approx(split.losses, rel=1e-4)
    assert_close_weights(whole.folder, split.folder, rtol=1e-3, atol=1e-5)


def test_micro_batches_become_smaller_down_to_one_row_of_each_process():
    sizes, train = [], TrainConfig(batch_size=12, gradient_accumulation_steps=2, num_processes=2)
    while train is not None:
        sizes.append((train.batch_size, train.gradient_accumulation_steps))
        assert train.num_steps(50) == 9, "three epochs of 24 rows a step, and of the two that are left"
        train = train.with_smaller_batches()
    assert sizes == [(12, 2), (6, 4), (2, 12)]


def test_gradient_checkpointing_recomputes_and_gives_the_same_losses(base, parent, train):
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    plain = train("deal", parent, train=SHORT)
    with base.model.model.layers[0].input_layernorm.register_forward_hook(count):
        saved = train("deal", parent, train=replace(SHORT, gradient_checkpointing=True))
    assert calls == 2 * SHORT.max_steps  # once forward, once again for the backward pass
    assert saved.losses == pytest.approx(plain.losses, rel=1e-5)
    assert train("deal", parent, train=SHORT).losses == plain.losses, "the base model is as it was"


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 1e-3},
        {"max_steps": 5},
        {"max_steps": None, "num_epochs": 1},
        {"batch_size": 2},
        {"gradient_accumulation_steps": 2},
        {"max_grad_norm": 1e-3},
        {"max_prompt_tokens": 40},
        {"max_answer_tokens": 1},
        {"seed": 1},
        {"balance_labels": False},
        {"schedule": "constant"},
        {"warmup_share": 0.5},
        {"weight_decay": 10.0},
    ],
    ids=str,
)
def test_every_setting_changes_the_result(change, train, trained_once):
    default = trained_once(is_first=True, train=SHORT).folder
    assert not same_weights(default, train(train=replace(SHORT, **change)).folder)


def test_saved_and_reloaded_adapter_gives_the_logits_it_had_in_memory(base, task, tmp_path):
    def logits(model):
        return first_answer_logits(model, base.tokenizer, task, "about the sea", max_prompt_tokens=64)

    model = attach_adapter(base.model, AdapterConfig(rank=4, alpha=6.0), seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(std=0.3)
    in_memory = logits(model)
    save_adapter(model, tmp_path, MethodState(strategy="seq_lora", stores="nothing"), base_name="tiny")
    model.unload()
    assert not torch.allclose(logits(base.model), in_memory, atol=1e-2)
    with adapter_on(base.model, tmp_path) as reloaded:
        torch.testing.assert_close(logits(reloaded), in_memory, rtol=0, atol=1e-6)


def test_the_base_is_bare_and_unchanged_after_training(base, train):
    before = {name: p.detach().clone() for name, p in base.model.named_parameters()}
    train("deal")
    after = dict(base.model.named_parameters())
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_is_written_is_a_plain_peft_folder_with_the_same_bytes_in_every_process(base, trained_once):
    folder = trained_once("deal", is_first=True).folder
    assert sorted(p.name for p in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "method.json",
        "method.safetensors",
    ]
    text = (folder / "adapter_config.json").read_text()
    config = json.loads(text)
    assert config["base_model_name_or_path"] == base.name
    # PEFT keeps module names in a set, whose order changes from process to process
    assert config["target_modules"] == sorted(config["target_modules"]) and len(config["target_modules"]) == 2
    assert text == json.dumps(config, indent=2, sort_keys=True) + "\n"
    method, num_bytes = json.loads((folder / "method.json").read_text()), load_method_state(folder).num_bytes
    assert method == {
        "schema_version": 1,
        "strategy": "deal",
        "stores": "data",
        "num_bytes": num_bytes,
        "num_arrivals": 1,
    }
    assert 0 < num_bytes < 2000, "six rows, as tokens"


def test_adapter_of_another_shape_is_refused(base, parent, tmp_path):
    broken = shutil.copytree(parent, tmp_path / "broken")
    config = json.loads((broken / "adapter_config.json").read_text())
    (broken / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["k_proj"]}))
    with pytest.raises(AdapterStateError, match="8 are unexpected"):
        load_adapter(base.model, broken)
    weights_path = broken / "adapter_model.safetensors"
    (broken / "adapter_config.json").write_text(json.dumps(config))
    whole = load_file(weights_path)
    first = sorted(whole)[0]
    for tensors, said in (
        ({n: t for n, t in whole.items() if n != first}, "1 keys are missing"),
        ({**whole, first: torch.zeros(4, 8)}, r"has shape \[4, 8\], the model expects \[4, 32\]"),
    ):
        save_file(tensors, weights_path)
        with pytest.raises(AdapterStateError, match=said):
            load_adapter(base.model, broken)
        assert not any("lora" in name for name, _ in base.model.named_parameters())
    weights_path.write_bytes(weights_path.read_bytes()[:-4])
    with pytest.raises(AdapterStateError, match=r"adapter_model\.safetensors is damaged"):
        load_adapter(base.model, broken)
    with pytest.raises(AdapterStateError, match="holds no adapter"):
        load_adapter(base.model, tmp_path)


def test_a_method_state_of_another_release_is_refused(parent):
    (parent / "method.json").write_text(json.dumps({"schema_version": 99}))
    with pytest.raises(AdapterStateError, match="schema version 99"):
        load_method_state(parent)


def test_no_rows_and_wrong_modules_are_refused(train, rows):
    with pytest.raises(DataValidationError, match="no training rows"):
        train("deal", rows=rows(0))
    with pytest.raises(ConfigError, match="nonesuch"):
        train("deal", adapter=AdapterConfig(rank=4, target_modules=("nonesuch",)))


def test_target_modules_and_alpha_reach_the_adapter(train):
    run = train("deal", adapter=AdapterConfig(rank=2, alpha=3.0, target_modules=("o_proj",)))
    config = json.loads((run.folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (2, 3.0, ["o_proj"])
    assert len(run.result.fill) == 2 and all("o_proj" in name for name in run.result.fill)


def test_nothing_is_looked_up_in_the_network(base, parent, train, tmp_path, monkeypatch):
    """PEFT asks the Hub for a base that an adapter names, when it saves, loads and checkpoints."""
    asked: list[object] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: asked.append(args))
    folder = train("deal", parent, train=replace(SHORT, checkpoint_steps=1)).folder
    with adapter_on(base.model, folder):
        pass
    assert asked == []
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == base.name


def test_rows_of_different_tasks_and_single_rows_share_no_prefix(base, task, rows):
    encoded = encode_rows(rows(2), base.tokenizer, task, max_prompt_tokens=64, max_answer_tokens=8)
    foreign = replace(task, instruction="x")
    other = encode_rows(rows(2), base.tokenizer, foreign, max_prompt_tokens=64, max_answer_tokens=8)
    collate = AnswerCollator(base.tokenizer, is_seq2seq=False, shares_prefix=True)
    assert "prefix_ids" not in collate([encoded[0]]) and "prefix_ids" not in collate([encoded[0], other[0]])
    same = collate([encoded[0], encoded[0]])
    assert same["input_ids"].shape[1] == 1 + len(encoded[0]["answer_ids"]), "a prompt's last token stays with the row"


def test_balanced_batches_hold_every_label_in_its_share():
    lengths = [(i * 37) % 100 for i in range(128)]
    labels = ["often" if i % 8 < 6 else "seldom" for i in range(128)]
    sampler = BucketSampler(lengths, 8, seed=0, labels=labels)
    order = list(sampler)
    batches = [order[start : start + 8] for start in range(0, 128, 8)]
    counts = [sum(labels[row] == "seldom" for row in batch) for batch in batches]
    assert sorted(order) == list(range(128)) and set(counts) <= {1, 2, 3} and counts.count(2) >= 10
    spread = [max(lengths[row] for row in batch) - min(lengths[row] for row in batch) for batch in batches]
    assert sum(spread) / len(spread) < 25  # 86 in a random order
    sampler.set_epoch(1)
    assert list(sampler) != order


def test_rows_per_second_counts_rows_and_not_places_in_batches(train, rows):
    """Ten rows in batches of four: the third step of an epoch has two rows."""
    config = TrainConfig(num_epochs=2, batch_size=4, max_prompt_tokens=64, checkpoint_steps=0)
    result = train("seq_lora", rows=rows(10), train=config).result
    assert result.num_steps == 6
    assert result.rows_per_second * result.seconds == pytest.approx(20)


def test_kept_rows_are_handed_on_and_those_of_tasks_without_rows_are_learned_once(train, rows, task):
    other = replace(task, name="shades")
    parent = train("replay", rows=rows(24), train=SHORT)
    parent = train("replay", parent.folder, task=other, old_tasks=(task,), rows=rows(24, first=50), train=SHORT)
    epoch = replace(SHORT, max_steps=None, num_epochs=1)
    state = load_method_state(parent.folder)
    num_kept = {name: len(unpack(state.kept_rows[rows_name(name)])) for name in ("colours", "shades")}

    def together(rows_of_colours, *learned):
        kept = KeptSource(folder=parent.folder, learned=learned)
        return train("seq_lora", task=task, rows=rows_of_colours, kept=kept, train=epoch)

    alone = together(rows(24))
    assert alone.result.num_steps == 6, "kept rows are handed on, and not learned"
    handed_on = load_method_state(alone.folder)
    assert handed_on.stores == "data" and handed_on.num_arrivals == state.num_arrivals + 1
    assert all(torch.equal(handed_on.kept_rows[name], tensor) for name, tensor in state.kept_rows.items())
    assert together(rows(24), task).result.num_steps == 6, "they are among the rows"
    assert together(rows(24), task, other).result.num_steps == 6 + math.ceil(num_kept["shades"] / 4)
    assert together(rows(0), other).result.num_steps == math.ceil(num_kept["shades"] / 4), "no other row is left"
