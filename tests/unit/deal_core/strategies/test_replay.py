"""Replay: plain LoRA with kept rows of the old tasks in every step; their right answers alone are learned."""

from __future__ import annotations

from deal_core.adapter.state import adapter_on, load_method_state
from deal_core.config import TrainConfig
from deal_core.data.prompts import encode_answer
from deal_core.data.schema import TaskSchema
from deal_core.method_config import MethodConfig, RehearsalConfig
from deal_core.strategies import make_strategy
from deal_core.strategies.kept_rows import rows_name, unpack
from tests.unit.deal_core.conftest import TONE, pairs, same_weights
from tests.unit.deal_core.strategies.conftest import labelled

LONG = TrainConfig(max_steps=12, batch_size=4, learning_rate=1e-2, max_prompt_tokens=64, checkpoint_steps=0)
OTHER = TaskSchema(name="other", labels=("large", "small"), instruction="How big is it?")


def test_the_kept_rows_of_the_old_tasks_are_rehearsed_with_their_labels_alone(base, task, train, make_context):
    folder = train("replay", train=LONG).folder
    state, strategy = load_method_state(folder), make_strategy("replay", MethodConfig(), 0)
    with adapter_on(base.model, folder) as model:
        strategy.prepare(model, state, make_context([task, OTHER]))
    (rows,) = strategy.rehearsal().sets
    assert sorted(rows, key=str) == sorted(unpack(state.tensors[rows_name("colours")]), key=str)
    assert len(rows) == 6 and all(row.tokens_KN is None for row in rows)


def test_of_kept_preferences_the_better_answers_alone_are_learned(base, train, make_context):
    folder = train("replay", task=TONE, rows=pairs(8), train=LONG).folder
    state, strategy = load_method_state(folder), make_strategy("replay", MethodConfig(), 0)
    assert len(unpack(state.tensors[rows_name(TONE.name)])) == 4, "both answers of two pairs are handed on"
    with adapter_on(base.model, folder) as model:
        strategy.prepare(model, state, make_context([TONE, OTHER]))
    (rows,) = strategy.rehearsal().sets
    better = [tuple(encode_answer(base.tokenizer, TONE, pair["output"], 256)) for pair in pairs(8)]
    assert len(rows) == 2 and {tuple(row.answer_ids) for row in rows} <= {*better}


def test_without_kept_rows_replay_is_plain_lora(task, train):
    none = RehearsalConfig(rows=0)
    given = {"old_tasks": (task,), "task": OTHER, "rows": labelled(OTHER, 12), "train": LONG}
    first = train("replay", rehearsal=none, train=LONG).folder
    assert load_method_state(first).stores == "nothing"
    replayed, plain = (train(strategy, first, **given).folder for strategy in ("replay", "seq_lora"))
    assert same_weights(replayed, plain)
    kept = train("replay", train=LONG).folder
    assert not same_weights(train("replay", kept, **given).folder, plain)
