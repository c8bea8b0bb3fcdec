"""An adapter that favours a label learns to favour it less. The tiny base model learns slowly."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from deal_core.strategies.answered import question
from deal_core.training.recentre import recentre_adapter
from safetensors.torch import load_file, save_file
from scipy.special import softmax

from deal_core.adapter.files import digests_of
from deal_core.adapter.state import adapter_on
from deal_core.config import TrainConfig
from deal_core.data.collate import answer_collator
from deal_core.data.prompts import encode_answer, encode_prompt
from deal_core.errors import TrainingDivergedError
from deal_core.evaluation.label_scores import label_scores
from deal_core.strategies.rehearsal import Rehearsal
from deal_core.strategies.strategy import TaskTexts

CLOSING = TrainConfig(recentre_steps=40, batch_size=8, learning_rate=2e-2, max_prompt_tokens=64)


def texts_of(task, rows: Dataset) -> TaskTexts:
    return TaskTexts(task=task, rows=rows, max_prompt_tokens=64, max_new_tokens=50)


def shares(base, task, folder: Path, texts: TaskTexts) -> np.ndarray:
    with adapter_on(base.model, folder) as model:
        scores, _ = label_scores(model, base.tokenizer, task, texts.rows, max_prompt_tokens=64)
    return softmax(scores, axis=1).mean(0)


@pytest.fixture
def favours_red(task, rows, train) -> Path:
    """A version that knows the labels, and then learned red rows alone."""
    learning = replace(CLOSING, recentre_steps=0, schedule="constant", max_steps=30, learning_rate=2e-2)
    knowing = train("seq_lora", rows=rows(72, first=300), train=learning).folder
    red = Dataset.from_list([row for row in rows(72, first=300) if row["output"] == "red"])
    biased = replace(learning, max_steps=3, learning_rate=1e-2)
    return train("seq_lora", knowing, rows=red, train=biased).folder


def test_a_favoured_label_is_unlearned_on_other_texts_too(base, task, rows, favours_red):
    texts, others = texts_of(task, rows(48, first=1000)), texts_of(task, rows(48, first=2000))
    before = shares(base, task, favours_red, others)
    (note,) = recentre_adapter(base, favours_red, [texts], CLOSING)
    after = shares(base, task, favours_red, others)
    assert before[0] / before[1] > 2 * after[0] / after[1]
    assert note.startswith("re-centred the labels of 1 tasks in 40 steps; before, 67% of the answers to colours")


def test_only_the_counts_of_the_labels_are_used(base, task, rows, favours_red, tmp_path):
    texts = texts_of(task, rows(24, first=1000))
    results = []
    for outputs in (list(texts.rows["output"]), list(reversed(texts.rows["output"]))):
        folder = tmp_path / str(len(results))
        folder.mkdir()
        for path in favours_red.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        rows = Dataset.from_dict({"input": list(texts.rows["input"]), "output": outputs})
        recentre_adapter(base, folder, [replace(texts, rows=rows)], CLOSING)
        results.append(load_file(folder / "adapter_model.safetensors"))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_activations_are_recomputed_if_the_training_does_that(base, task, rows, parent, tmp_path):
    texts, results, seen = texts_of(task, rows(12, first=1000)), [], []
    closing = replace(CLOSING, recentre_steps=2)

    def note(layer, *_) -> None:
        if layer.training:
            seen.append(base.model.is_gradient_checkpointing)

    for recomputes in (False, True):
        folder = shutil.copytree(parent, tmp_path / str(recomputes))
        with base.model.model.layers[0].input_layernorm.register_forward_hook(note):
            recentre_adapter(base, folder, [texts], replace(closing, gradient_checkpointing=recomputes))
        results.append(load_file(folder / "adapter_model.safetensors"))
    assert seen.count(True) == 2 * closing.recentre_steps, "once forward, once again for the backward pass"
    for name, plain in results[0].items():
        torch.testing.assert_close(results[1][name], plain, rtol=1e-4, atol=1e-5)
    assert not base.model.is_gradient_checkpointing


def test_what_the_strategy_keeps_stays(base, task, rows, parent, train):
    kept = train("replay", parent).folder
    before = digests_of(kept)
    recentre_adapter(base, kept, [texts_of(task, rows(12, first=1000))], CLOSING)
    after = digests_of(kept)
    assert {name for name in before if before[name] != after[name]} == {"adapter_model.safetensors"}


def test_without_steps_labels_or_texts_nothing_changes(base, task, rows, parent):
    before, texts = digests_of(parent), texts_of(task, rows(12, first=1000))
    assert recentre_adapter(base, parent, [texts], replace(CLOSING, recentre_steps=0)) == ()
    assert recentre_adapter(base, parent, [replace(texts, task=replace(task, labels=()))], CLOSING) == ()
    assert recentre_adapter(base, parent, [replace(texts, rows=texts.rows.select([]))], CLOSING) == ()
    assert digests_of(parent) == before


def test_an_adapter_that_diverged_is_refused(base, task, rows, parent):
    file = parent / "adapter_model.safetensors"
    save_file({name: tensor * torch.nan for name, tensor in load_file(file).items()}, file)
    with pytest.raises(TrainingDivergedError, match=r"labels of colours .* Lower train.learning_rate"):
        recentre_adapter(base, parent, [texts_of(task, rows(12, first=1000))], CLOSING)


def test_a_question_targets_the_labels_probabilities():
    """Labels that begin alike share the first token's probability."""
    labels, goal = [[5, 6, 1], [5, 7, 1], [8, 1]], np.array([0.5, 0.2, 0.3])
    drawn = [question([1, 2], labels, goal, random.Random(seed)) for seed in range(300)]
    assert [sum(each.answer_ids == label for each in drawn) / 300 for label in labels] == pytest.approx(goal, abs=0.1)
    asked = next(each for each in drawn if each.answer_ids == [5, 6, 1])
    targets = [
        dict(zip(tokens, chances, strict=True))
        for tokens, chances in zip(asked.tokens_KN.tolist(), asked.shares_KN.tolist(), strict=True)
    ]
    assert targets[0] == pytest.approx({5: 0.7, 8: 0.3})
    assert targets[1] == pytest.approx({6: 0.5 / 0.7, 7: 0.2 / 0.7})
    assert targets[2][1] == pytest.approx(1.0)


def test_swapped_targets_leave_a_larger_loss(base, task, rows, parent):
    """A model's own probabilities are the targets with the smaller loss."""
    texts = texts_of(task, rows(6, first=1000))
    collate = answer_collator(base.model, base.tokenizer, is_recomputed=False)
    labels = [encode_answer(base.tokenizer, task, label, 64) for label in task.labels]
    prompts = [encode_prompt(base.tokenizer, task, text, 64) for text in list(texts.rows["input"])]
    with adapter_on(base.model, parent) as model:
        scores, _ = label_scores(model, base.tokenizer, task, texts.rows, max_prompt_tokens=64)
        own = softmax(scores, axis=1)

        def loss(goals: np.ndarray) -> float:
            asked = [
                question(prompt, labels, goal, random.Random(0)) for prompt, goal in zip(prompts, goals, strict=True)
            ]
            return float(Rehearsal([[asked]], collate, num_rows=6, weight=1.0, temperature=1.0, seed=0).loss(model, 0))

        assert loss(own) < loss(np.roll(own, 1, axis=1))
