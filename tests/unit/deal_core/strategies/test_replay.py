"""Replay: plain LoRA with kept rows of the old tasks in every step; their right answers alone are learned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset

from deal_core.adapter.state import adapter_on, load_method_state
from deal_core.config import TrainConfig
from deal_core.data.prompts import encode_answer
from deal_core.data.schema import TaskSchema
from deal_core.method_config import MethodConfig, RehearsalConfig
from deal_core.strategies import make_strategy
from deal_core.strategies.kept_rows import rows_name, unpack
from deal_core.strategies.replay import Replay
from deal_core.strategies.strategy import KeptRows, PlannedArrival
from tests.unit.deal_core.conftest import weights

LONG = TrainConfig(max_steps=12, batch_size=4, learning_rate=1e-2, max_prompt_tokens=64, checkpoint_steps=0)
OTHER = TaskSchema(name="other", labels=("large", "small"), instruction="How big is it?")


def are_equal(first: Path, second: Path) -> bool:
    one, other = weights(first), weights(second)
    return all(torch.equal(one[name], other[name]) for name in one)


def test_first_task_is_plain_lora(train):
    assert are_equal(*(train(strategy, train=LONG).folder for strategy in ("replay", "seq_lora")))


def test_every_later_task_is_learned(train):
    first = train("replay", train=LONG).folder
    quick = TrainConfig(max_steps=30, batch_size=8, learning_rate=2e-2, checkpoint_steps=0)
    losses = train("replay", first, train=quick).losses
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_the_kept_rows_of_the_old_tasks_are_rehearsed_with_their_labels_alone(base, task, train, make_context):
    folder = train("replay", train=LONG).folder
    state, strategy = load_method_state(folder), make_strategy("replay", MethodConfig(), 0)
    with adapter_on(base.model, folder) as model:
        strategy.prepare(model, state, make_context([task, OTHER]))
    (rows,) = strategy.rehearsal().sets
    assert sorted(rows, key=str) == sorted(unpack(state.tensors[rows_name("colours")]), key=str)
    assert len(rows) == 6 and all(row.tokens_KN is None for row in rows)


def test_of_kept_preferences_the_better_answers_alone_are_learned(base, train, make_context):
    tone = TaskSchema(name="tone", format="completion", metric="preference", learns_preferences=True)
    pairs = [{"input": f"tap {i} drips", "output": f"red rose {i}", "rejected": f"blue moss {i}"} for i in range(8)]
    folder = train("replay", task=tone, rows=Dataset.from_list(pairs), train=LONG).folder
    state, strategy = load_method_state(folder), make_strategy("replay", MethodConfig(), 0)
    assert len(unpack(state.tensors[rows_name("tone")])) == 4, "both answers of two pairs are handed on"
    with adapter_on(base.model, folder) as model:
        strategy.prepare(model, state, make_context([tone, OTHER]))
    (rows,) = strategy.rehearsal().sets
    better = [tuple(encode_answer(base.tokenizer, tone, pair["output"], 256)) for pair in pairs]
    assert len(rows) == 2 and {tuple(row.answer_ids) for row in rows} <= {*better}


def test_without_kept_rows_replay_is_plain_lora(task, train):
    none, given = RehearsalConfig(rows=0), {"old_tasks": (task,), "task": OTHER, "train": LONG}
    given["rows"] = Dataset.from_list([{"input": f"number {i}", "output": OTHER.labels[i % 2]} for i in range(12)])
    first = train("replay", rehearsal=none, train=LONG).folder
    assert load_method_state(first).stores == "nothing"
    replayed, plain = (train(strategy, first, **given).folder for strategy in ("replay", "seq_lora"))
    assert are_equal(replayed, plain)
    kept = train("replay", train=LONG).folder
    assert not are_equal(train("replay", kept, **given).folder, plain)


def test_a_plan_counts_the_kept_rows_of_a_step(task):
    for kept, expected in (({}, 0), ({"colours": KeptRows(6, 20, 3)}, 4)):
        arrival = PlannedArrival(task=OTHER, old_tasks=(task,), kept=kept, num_rows=9, num_steps=3)
        assert Replay.rehearsed_per_step(MethodConfig(), arrival) == expected
        assert Replay.num_answered(MethodConfig(), arrival) == 0, "their labels need no answers"


@pytest.mark.parametrize("per_step", [1, 9])
def test_a_step_has_as_many_kept_rows_as_are_set(task, train, per_step):
    first = train("replay", train=LONG).folder
    run = train("replay", first, old_tasks=(task,), train=LONG, rehearsal=RehearsalConfig(per_step=per_step))
    assert f"rehearsed 6 rows of one old task, {per_step} a step" in run.result.notes
