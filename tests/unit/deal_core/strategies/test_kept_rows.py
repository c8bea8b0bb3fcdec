"""Rows that are kept of every task: which ones, how they travel from version to version, and what is learned from them.

Shapes: N rows, K tokens of an answer.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.special import softmax

from deal_core.adapter.state import (
    adapter_on,
    empty_tensors,
    kept_of_tasks,
    load_method_state,
)
from deal_core.config import TrainConfig
from deal_core.data.order import stratified_sample
from deal_core.data.prompts import encode_answer, encode_prompt
from deal_core.data.schema import TaskSchema
from deal_core.errors import TrainingDivergedError
from deal_core.evaluation.label_scores import label_log_probs, label_offsets
from deal_core.method_config import RehearsalConfig
from deal_core.strategies import old_tasks
from deal_core.strategies.kept_rows import pack, rows_name, sizes_of, unpack
from deal_core.strategies.old_tasks import labelled_rows, with_targets
from deal_core.strategies.rehearsal import Rehearsal, RehearsedRow
from deal_core.strategies.strategy import KeptSize
from tests.unit.deal_core.conftest import TONE, at_night, pairs
from tests.unit.deal_core.strategies.conftest import (
    EIGHT_STEPS,
    SIZES,
    STORY,
    encoded,
    encoded_prompts,
    labelled,
    prompts_of,
)

ONE_STEP = TrainConfig(max_steps=1, batch_size=4, max_prompt_tokens=64, checkpoint_steps=0)


def kept_by(folder: Path, task: TaskSchema) -> list[RehearsedRow]:
    return unpack(load_method_state(folder).tensors[rows_name(task.name)])


# --- which rows are kept


def test_a_quarter_of_the_rows_is_kept_and_at_most_fifty():
    assert [RehearsalConfig().num_kept(num_rows) for num_rows in (1, 3, 72, 150, 5000)] == [1, 1, 18, 38, 50]
    assert [RehearsalConfig(rows=0).num_kept(num_rows) for num_rows in (1, 72, 5000)] == [0, 0, 0]
    assert [RehearsalConfig(rows=7).num_kept(num_rows) for num_rows in (8, 28, 5000)] == [2, 7, 7]


@pytest.mark.parametrize("shares", [(1, 1), (6, 3, 1), (1,) * 14, (20, 1, 1)], ids=str)
def test_every_label_keeps_its_share(shares):
    labels = [label for label, share in enumerate(shares) for _ in range(share * 300 // sum(shares))]
    for seed in range(20):
        places = stratified_sample(labels, 50, seed)
        counts = Counter(labels[place] for place in places)
        assert len(set(places)) == len(places) == 50
        assert all(abs(counts[label] - 50 * share / sum(shares)) < 1.5 for label, share in enumerate(shares))


def test_the_seed_alone_decides_which_rows_are_kept():
    labels = [number % 3 for number in range(150)]
    assert stratified_sample(labels, 38, seed=1) == stratified_sample(labels, 38, seed=1)
    assert set(stratified_sample(labels, 38, seed=1)) != set(stratified_sample(labels, 38, seed=2))


def test_packed_rows_come_back():
    rows = [RehearsedRow([5, 6, 7], [8]), RehearsedRow([9], [10, 11]), RehearsedRow([12], [])]
    assert unpack(pack(rows)) == rows and unpack(pack([])) == []


def test_sizes_are_those_of_the_longest_row():
    kept = {
        rows_name("sizes"): pack([RehearsedRow([1, 2, 3], [4]), RehearsedRow([5], [6, 7])]),
        rows_name("forgotten"): pack([]),
        rows_name("other"): pack([RehearsedRow([1], [2])]),
    }
    sizes = sizes_of(kept, ["sizes", "forgotten", "new"])
    assert sizes == {"sizes": KeptSize(num_rows=2, longest_prompt=3, longest_answer=2)}


# --- how they travel


@pytest.mark.parametrize("strategies", [("deal", "replay", "deal"), ("replay", "deal", "replay")])
def test_rows_of_every_task_travel_from_version_to_version_whichever_strategy_is_next(
    base, task, rows, train, strategies
):
    arrivals = ((task, rows(24)), (SIZES, labelled(SIZES, 12)), (STORY, labelled(STORY, 8)))
    folders, olds = [None], []
    for strategy, (new, new_rows) in zip(strategies, arrivals, strict=True):
        run = train(strategy, folders[-1], task=new, rows=new_rows, old_tasks=olds, train=ONE_STEP)
        assert not any("gone" in note for note in run.result.notes)
        folders.append(run.folder)
        olds.append(new)
    _, first, second, third = folders
    assert [load_method_state(folder).stores for folder in (first, second, third)] == ["data"] * 3
    state = load_method_state(third).tensors
    assert {name: len(unpack(rows)) for name, rows in state.items()} == {
        rows_name("colours"): 6,
        rows_name("sizes"): 3,
        rows_name("story"): 2,
    }
    assert kept_of_tasks(third).keys() == state.keys()
    assert kept_by(third, task) == kept_by(first, task) and kept_by(third, SIZES) == kept_by(second, SIZES)
    answers = Counter(tuple(row.answer_ids) for row in kept_by(first, task))
    assert answers == {tuple(encode_answer(base.tokenizer, task, label, 50)): 2 for label in task.labels}
    assert prompts_of(kept_by(first, task)) <= encoded_prompts(base, task, rows(24)["input"])


def test_the_rows_that_return_are_drawn_from_old_and_new_ones(base, task, rows, train):
    first = train("deal", rows=rows(96), train=ONE_STEP).folder
    second = train("deal", first, rows=rows(96, first=500), old_tasks=(task,), train=ONE_STEP).folder
    before, after = (prompts_of(kept_by(folder, task)) for folder in (first, second))
    new = encoded_prompts(base, task, rows(96, first=500)["input"])
    assert (len(before), len(after)) == (24, 30), "a quarter of 24 kept and 96 new rows"
    assert after <= before | new and after & before and after & new


@pytest.mark.parametrize(("limit", "expected"), [(50, 24), (10, 10)])
def test_few_new_rows_do_not_make_the_kept_ones_fewer(task, rows, train, limit, expected):
    first = train("deal", rows=rows(96), train=ONE_STEP).folder
    fewer = RehearsalConfig(rows=limit)
    second = train("deal", first, rows=rows(4, first=500), old_tasks=(task,), train=ONE_STEP, rehearsal=fewer).folder
    assert len(kept_by(first, task)) == 24 and len(kept_by(second, task)) == expected


def test_rows_are_kept_only_if_they_are_asked_for(task, train):
    none = RehearsalConfig(rows=0)
    first = train("deal", rehearsal=none, train=ONE_STEP).folder
    assert load_method_state(first).stores == "nothing" and load_method_state(first).tensors == {}
    assert not (first / "method.safetensors").exists()
    kept = train("deal", train=ONE_STEP).folder
    second = train("deal", kept, task=SIZES, rows=labelled(SIZES, 8), old_tasks=(task,), rehearsal=none, train=ONE_STEP)
    assert "rehearsed 6 rows of one old task, 4 a step" in second.result.notes, "which the parent keeps"
    assert any("kept rows of 1 tasks are gone" in note for note in second.result.notes)
    assert load_method_state(second.folder).tensors == {}


@pytest.mark.parametrize("strategy", ["deal", "replay"])
def test_of_preferences_both_answers_are_kept(base, task, train, strategy):
    first = train(strategy, task=TONE, rows=pairs(16), train=ONE_STEP).folder
    rows = kept_by(first, TONE)
    texts = [base.tokenizer.decode(row.answer_ids, skip_special_tokens=True).split() for row in rows]
    assert [text[:2] for text in texts] == [["red", "rose"], ["blue", "moss"]] * 4
    assert all(better.prompt_ids == worse.prompt_ids for better, worse in zip(rows[::2], rows[1::2], strict=True))
    assert [text[2] for text in texts[::2]] == [text[2] for text in texts[1::2]] and len(prompts_of(rows)) == 4
    again = train(strategy, first, task=TONE, rows=pairs(28), old_tasks=(TONE,), train=ONE_STEP).folder
    kept = kept_by(again, TONE)
    assert len(kept) == 2 * 8, "a quarter of 4 kept and 28 new pairs"
    assert all(better.prompt_ids == worse.prompt_ids for better, worse in zip(kept[::2], kept[1::2], strict=True))


def test_a_task_with_deleted_rows_is_rehearsed_on_the_new_texts_and_keeps_none(task, train):
    first = train("deal", train=ONE_STEP).folder
    empty_tensors(first, [rows_name("colours")])
    second = train("deal", first, task=SIZES, rows=labelled(SIZES, 8), old_tasks=(task,), train=ONE_STEP)
    assert second.result.notes[0] == "rehearsed 4 rows of one old task, 4 a step"
    assert kept_by(second.folder, task) == [] and len(kept_by(second.folder, SIZES)) == 2


# --- what is learned from them


@pytest.fixture
def targets(base, parent, make_context):
    """Kept rows of a task with their targets, which the parent makes with a weight of the right answers."""

    def make(task: TaskSchema, rows: Sequence[RehearsedRow], weight: float) -> list[RehearsedRow]:
        with adapter_on(base.model, parent) as model:
            return with_targets(rows, task, model, make_context([task]), random.Random(0), weight)

    return make


def shares_of(row: RehearsedRow) -> list[dict[int, float]]:
    """The target at each token of the answer, without tokens of share 0."""
    return [
        {token: share for token, share in zip(tokens, shares, strict=True) if share > 0}
        for tokens, shares in zip(row.tokens_KN.tolist(), row.shares_KN.tolist(), strict=True)
    ]


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_the_target_of_a_labelled_row_is_the_right_label_and_the_parents_calibrated_answer(
    base, parent, targets, weight
):
    """Two labels begin alike, so that their first token has the sum of their probabilities."""
    rows = labelled(SIZES, 30)
    with adapter_on(base.model, parent) as model:
        log_probs_NL = label_log_probs(model, base.tokenizer, SIZES, list(rows["input"]), max_prompt_tokens=64)
    right_N = np.array([SIZES.labels.index(output) for output in rows["output"]])
    plain_NL = log_probs_NL.double().numpy()
    calibrated_NL = softmax(plain_NL + label_offsets(plain_NL, right_N), axis=1)
    assert np.abs(calibrated_NL - softmax(plain_NL, axis=1)).max() > 0.05, "the parent favours a label"
    goals_NL = (1 - weight) * calibrated_NL + weight * np.eye(3)[right_N]

    labels = [tuple(encode_answer(base.tokenizer, SIZES, label, 50)) for label in SIZES.labels]
    assert labels[0][0] == labels[1][0] != labels[2][0]
    made = targets(SIZES, encoded(base, SIZES, rows), weight)
    for row, goal_L in zip(made, goals_NL, strict=True):
        shares = shares_of(row)
        assert shares[0] == pytest.approx(
            {token: share for token, share in ((labels[0][0], goal_L[:2].sum()), (labels[2][0], goal_L[2])) if share},
            abs=1e-5,
        )
        product = math.prod(share[token] for token, share in zip(row.answer_ids, shares, strict=True))
        assert product == pytest.approx(goal_L[labels.index(tuple(row.answer_ids))], abs=1e-5), "by the chain rule"
    if weight == 1:
        assert [labels.index(tuple(row.answer_ids)) for row in made] == right_N.tolist()


def test_answers_are_drawn_from_the_labels_with_the_targets_probabilities(base, parent):
    """One prompt many times, with right labels in the shares 1/2, 1/3, 1/6, so all rows have one target."""
    labels = [tuple(encode_answer(base.tokenizer, SIZES, label, 50)) for label in SIZES.labels]
    prompt, right_N = encode_prompt(base.tokenizer, SIZES, "a house", 64), np.array([0, 0, 0, 1, 1, 2] * 100)
    with adapter_on(base.model, parent) as model:
        made = labelled_rows(
            model, base.tokenizer, "sizes", [prompt] * 600, labels, right_N, random.Random(0), answer_weight=0.0
        )
    chances = {
        tuple(row.answer_ids): math.prod(
            shares[token] for token, shares in zip(row.answer_ids, shares_of(row), strict=True)
        )
        for row in made
    }
    assert [chances[label] for label in labels] == pytest.approx([1 / 2, 1 / 3, 1 / 6], abs=0.05), "calibrated"
    counts = Counter(tuple(row.answer_ids) for row in made)
    assert {label: count / 600 for label, count in counts.items()} == pytest.approx(chances, abs=0.07)


def log_probs_alone(base, parent: Path, row: RehearsedRow) -> torch.Tensor:
    """The parent's log-probabilities of all tokens at a row's answer, read alone (K × vocabulary)."""
    ids = torch.tensor([[*row.prompt_ids, *row.answer_ids]])
    with adapter_on(base.model, parent) as model, torch.no_grad():
        return model(input_ids=ids).logits[0, len(row.prompt_ids) - 1 : -1].log_softmax(-1)


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_the_target_of_a_free_answer_is_its_tokens_and_the_parents_probabilities_there(base, parent, targets, weight):
    rows = encoded(base, STORY, labelled(STORY, 20))  # more than one batch, and answers of different lengths
    made = targets(STORY, rows, weight)
    assert [(row.prompt_ids, row.answer_ids) for row in made] == [(row.prompt_ids, row.answer_ids) for row in rows]
    for row in made[:3] + made[-3:]:
        parents = log_probs_alone(base, parent, row).exp()
        for share, own, right in zip(shares_of(row), parents, row.answer_ids, strict=True):
            expected = (1 - weight) * own
            expected[right] += weight
            assert share == pytest.approx({token: float(expected[token]) for token in share}, abs=1e-5)
            assert sum(share.values()) == pytest.approx(float(expected.topk(64).values.sum()), abs=1e-4)
            assert share.get(right, 0.0) >= weight


def test_a_labelled_row_whose_answer_is_no_label_has_the_target_of_a_free_answer(base, parent, targets):
    """An earlier, shorter limit has cut it."""
    rows = encoded(base, SIZES, labelled(SIZES, 3))
    cut = [replace(rows[0], answer_ids=[*rows[0].answer_ids[:1], rows[0].answer_ids[-1]]), *rows[1:]]
    made = targets(SIZES, cut, 0.5)
    assert [row.answer_ids for row in made] == [row.answer_ids for row in cut]
    assert all(len(row.shares_KN[0]) == 64 for row in made)


def test_the_target_of_a_preference_is_the_parents_at_both_answers(base, parent, targets):
    better, worse = (encoded(base, TONE, pairs(5), column) for column in ("output", "rejected"))
    rows = [row for pair in zip(better, worse, strict=True) for row in pair]
    made = targets(TONE, rows, 0.5)
    assert [row.answer_ids for row in made] == [row.answer_ids for row in rows]
    for row in made[:4]:
        expected = log_probs_alone(base, parent, row).exp().gather(-1, row.tokens_KN)
        torch.testing.assert_close(row.shares_KN, expected, atol=1e-5, rtol=1e-3)


def test_a_parent_that_diverged_is_named(base, parent, targets):
    file = parent / "adapter_model.safetensors"
    save_file({name: tensor * torch.nan for name, tensor in load_file(file).items()}, file)
    with pytest.raises(TrainingDivergedError, match="scores labels of sizes with numbers that are not finite"):
        targets(SIZES, encoded(base, SIZES, labelled(SIZES, 3)), 0.5)


def test_every_arrival_rehearses_in_another_order_and_half_of_a_target_is_the_right_answer(task, train, monkeypatch):
    """Otherwise, with fewer steps than rows, the same few rows would be learned every time, and the others never."""
    orders, make = [], old_tasks.make_rehearsal

    def record(*given, **named):
        assert named == {"answer_weight": 0.5}
        made = make(*given, **named)
        orders.append([tuple(row.prompt_ids) for row in made.sets[0]] if made else [])
        return made

    monkeypatch.setattr(old_tasks, "make_rehearsal", record)
    folder = train("deal", train=ONE_STEP).folder
    for name in ("second", "third"):
        new = replace(SIZES, name=name)
        folder = train("deal", folder, task=new, rows=labelled(new, 8), old_tasks=(task,), train=ONE_STEP).folder
    _, second, third = orders
    assert sorted(second) == sorted(third) and second != third


@pytest.mark.parametrize("strategy", ["deal", *at_night("replay")])
def test_a_killed_training_with_kept_rows_ends_with_the_same_losses(task, train, killed_and_resumed, strategy):
    """One old task has kept rows, and another one has none."""
    first = train(strategy, train=ONE_STEP).folder
    given = {"task": STORY, "rows": labelled(STORY, 24), "old_tasks": (task, SIZES), "train": EIGHT_STEPS}
    whole = train(strategy, first, **given)
    resumed = killed_and_resumed(strategy, first, at=6, **given)
    assert resumed.result.resumed_from_step == 4 and resumed.losses == whole.losses


@pytest.mark.parametrize("strategy", ["deal", *at_night("replay")])
def test_kept_rows_are_held_while_another_task_is_learned(base, task, train, make_context, strategy):
    """The loss of the kept rows with their targets, after another task: with rehearsal and without it."""
    learning = replace(EIGHT_STEPS, max_steps=40, learning_rate=3e-2, checkpoint_steps=0)
    first = train(strategy, train=learning).folder
    context, kept = make_context([task]), kept_by(first, task)
    if strategy == "deal":
        with adapter_on(base.model, first) as model:
            kept = with_targets(kept, task, model, context, random.Random(0), 0.5)
    rehearsal = Rehearsal([kept], context.collator(), num_rows=len(kept), seed=0)

    def loss(folder: Path) -> float:
        with adapter_on(base.model, folder) as model, torch.no_grad():
            return float(rehearsal.loss(model, 0))

    given = {"task": SIZES, "rows": labelled(SIZES, 24), "train": learning}
    alone, rehearsed = (loss(train(strategy, first, old_tasks=olds, **given).folder) for olds in ((), (task,)))
    assert rehearsed < 0.75 * alone, (rehearsed, alone)
