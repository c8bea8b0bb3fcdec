"""Old tasks without kept rows are rehearsed on the new task's texts, and held to the parent's own answers."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from deal_core.adapter.state import adapter_on
from deal_core.data.schema import TaskSchema
from deal_core.evaluation.generation import generate
from deal_core.method_config import DealConfig, MethodConfig, RehearsalConfig
from deal_core.strategies.deal import Deal
from deal_core.strategies.kept_rows import pack, rows_name, sizes_of
from deal_core.strategies.old_tasks import num_answered, tasks_to_ask
from deal_core.strategies.rehearsal import RehearsedRow, with_model_targets
from deal_core.strategies.seq_lora import SeqLora
from deal_core.strategies.strategy import PlannedArrival
from tests.unit.deal_core.strategies.conftest import (
    EIGHT_STEPS,
    NEW,
    STORY,
    encoded,
    encoded_prompts,
    labelled,
    prompts_of,
)

SIZES = TaskSchema(name="sizes", labels=("large", "small"), instruction="How big is it?")
SHAPES = TaskSchema(name="shapes", labels=("round", "flat"), instruction="Which shape is it?")
CHAT = TaskSchema(name="chats", format="chat")


def test_a_task_with_kept_rows_is_rehearsed_on_these_and_any_other_on_the_new_texts(base, arrive, rows):
    kept = encoded(base, SIZES, labelled(SIZES, 10))
    asked, again = sorted(arrive([SIZES, SHAPES], {rows_name("sizes"): pack(kept)}).sets, key=len)
    assert prompts_of(again) == prompts_of(kept)
    assert prompts_of(asked) == encoded_prompts(base, SHAPES, rows(6)["input"])


def test_a_task_that_returns_is_rehearsed_by_its_kept_rows_alone(base, arrive):
    kept = encoded(base, SIZES, labelled(SIZES, 4))
    before = replace(SIZES, instruction="In other words, how big is it?")
    (again,) = arrive([before], {rows_name("sizes"): pack(kept)}, new=SIZES).sets
    assert prompts_of(again) == prompts_of(kept)
    assert arrive([before], new=SIZES) is None


@pytest.mark.parametrize("olds", [[SIZES, SHAPES, STORY], [SIZES, replace(SHAPES, name="new"), NEW], [CHAT], []])
@pytest.mark.parametrize("has_kept", [False, True])
def test_a_plan_knows_how_many_rows_the_parent_answers(base, arrive, olds, has_kept):
    has_kept = has_kept and SIZES in olds
    kept = {rows_name("sizes"): pack(encoded(base, SIZES, labelled(SIZES, 10)))} if has_kept else {}
    made = arrive(olds, kept)
    arrival = PlannedArrival(
        task=NEW,
        old_tasks=tuple(olds),
        kept=sizes_of(kept, [old.name for old in olds]),
        num_rows=6,
        num_steps=EIGHT_STEPS.num_steps(6),
    )
    assert num_answered(RehearsalConfig(), arrival) == (0 if made is None else sum(map(len, made.sets)))
    assert Deal.num_answered(MethodConfig(), arrival) == num_answered(RehearsalConfig(), arrival)
    assert Deal.rehearsed_per_step(MethodConfig(), arrival) == (0 if made is None else 4)
    assert SeqLora.num_answered(MethodConfig(), arrival) == SeqLora.rehearsed_per_step(MethodConfig(), arrival) == 0


@pytest.mark.parametrize(("num_old", "num_texts", "expected"), [(1, 256, 16), (4, 256, 4), (3, 6, 2)])
def test_no_more_texts_are_answered_than_the_steps_use(num_old, num_texts, expected, parent, train, monkeypatch):
    """Four steps of four rows: the cost of an arrival does not grow with the number of old tasks."""
    monkeypatch.setattr("deal_core.strategies.old_tasks.NUM_TEXTS", num_texts)
    olds = [TaskSchema(name=f"old-{i}", labels=("large", "small"), instruction=f"How big? {i}") for i in range(num_old)]
    tasks = "one old task" if num_old == 1 else f"{num_old} old tasks"
    note = f"rehearsed {expected * num_old} rows of {tasks}, 4 a step"
    assert train("deal", parent, old_tasks=olds).result.notes[0] == note


@pytest.mark.parametrize("per_step", [1, 9])
def test_a_step_has_as_many_rehearsed_rows_as_are_set(arrive, parent, train, per_step):
    assert len(arrive([SIZES, SHAPES], per_step=per_step).draw(0)) == per_step
    run = train("deal", parent, old_tasks=(SIZES,), rehearsal=RehearsalConfig(per_step=per_step))
    assert run.result.notes[0].endswith(f" rows of one old task, {per_step} a step")


def test_a_task_is_asked_once_in_the_same_words_and_not_in_those_of_the_new_one():
    def task(name: str, instruction: str, labels: str = "ab", **fields: str) -> TaskSchema:
        return TaskSchema(name=name, instruction=instruction, labels=tuple(labels), **fields)

    new = task("new", "Which?")
    olds = [
        task("alike", "Which?", "ba"),
        task("other-labels", "Which?", "abc"),
        task("first", "How?"),
        task("again", "How?", "ba"),
        task("other-template", "How?", template="{text} {options}"),
        task("new", "Why?"),
        TaskSchema(name="chat", format="chat", instruction="Why?"),
        task("other-form", "Which?", prompt="chat"),
    ]
    assert [old.name for old in tasks_to_ask(olds, new)] == ["other-labels", "again", "other-template", "other-form"]


def test_notes_name_the_old_tasks_that_are_not_rehearsed(base, parent, train, task):
    alike = TaskSchema(name="alike", labels=task.labels[::-1], instruction=task.instruction + " ")
    given = {"deal": DealConfig(core="free")}
    rehearsed, left_out = train("deal", parent, old_tasks=(SIZES, alike), **given).result.notes
    assert "of one old task" in rehearsed and left_out.endswith(": alike")
    assert len(train("deal", parent, old_tasks=(SIZES,), **given).result.notes) == 1
    second = train("deal", train("deal", parent, task=alike, **given).folder, old_tasks=(alike,), **given)
    (note,) = second.result.notes
    assert note == "rehearsed 6 rows of one old task, 4 a step", "its kept rows need no other words"


def test_the_parent_is_asked_once_and_its_answer_held_as_it_was(base, parent, arrive, make_context, task):
    """Generation's distribution at each token equals that of a pass over prompt and answer."""
    (rows,) = arrive([task]).sets
    with adapter_on(base.model, parent) as model:
        plain = [RehearsedRow(row.prompt_ids, row.answer_ids) for row in rows]
        again = with_model_targets(
            model, make_context([]).collator(), plain, lambda logits_KV, _: logits_KV.softmax(-1)
        )
    assert len(rows) == 6 and all(base.tokenizer.eos_token_id not in row.answer_ids[:-1] for row in rows)
    for one, other in zip(rows, again, strict=True):
        assert torch.equal(one.tokens_KN[:, 0], other.tokens_KN[:, 0])
        torch.testing.assert_close(one.shares_KN, other.shares_KN, rtol=1e-3, atol=1e-5)


def test_a_task_without_labels_is_held_to_the_parents_own_words(base, parent, arrive):
    (rows,) = arrive([STORY]).sets
    prompts, words = [list(row.prompt_ids) for row in rows], {}
    with adapter_on(base.model, parent) as model:
        for batch, answers, _ in generate(model, base.tokenizer, prompts, 50):
            words |= {tuple(prompts[i]): answer for i, answer in zip(batch, answers, strict=True)}
    assert len(words) == 6
    for row in rows:
        assert list(row.answer_ids) == list(words[tuple(row.prompt_ids)][: len(row.answer_ids)])


def test_a_new_tasks_short_answers_do_not_cut_those_of_an_old_task(arrive):
    lengths = [
        [len(row.answer_ids) for row in arrive([STORY], train=replace(EIGHT_STEPS, max_answer_tokens=limit)).sets[0]]
        for limit in (50, 2)
    ]
    assert max(lengths[0]) > 2 and lengths[1] == lengths[0]


def test_old_tasks_that_are_asked_together_answer_as_each_alone(arrive, monkeypatch):
    olds = (
        TaskSchema(name="short", labels=("a", "b"), instruction="Which is it?"),
        TaskSchema(name="long", labels=("very large indeed", "small"), instruction="How big would you say it is?"),
        TaskSchema(name="third", labels=("red", "blue sky"), instruction="Of what colour?"),
    )
    made = []
    for min_sharing in (0, 1000):
        monkeypatch.setattr("deal_core.strategies.old_tasks.MIN_SHARING", min_sharing)
        made.append(arrive(olds).sets)
    alone, together = made
    assert [len(rows) for rows in together] == [6, 6, 6]
    assert len({len(row.answer_ids) for rows in alone for row in rows}) > 1, "limits differ"
    for one, other in zip(itertools.chain(*alone), itertools.chain(*together), strict=True):
        assert (one.prompt_ids, one.answer_ids) == (other.prompt_ids, other.answer_ids)
        assert torch.equal(one.tokens_KN[:, 0], other.tokens_KN[:, 0])
        torch.testing.assert_close(one.shares_KN, other.shares_KN, rtol=1e-3, atol=1e-5)
