"""`rehearsal.texts: own`: old tasks are asked about texts of their own, and held to earlier answers, re-centred."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest
import torch
from datasets import Dataset
from deal_core.strategies.answered import recentred_questions
from deal_core.strategies.questions import answers_name, make_rehearsal
from safetensors.torch import load_file

from deal_core.adapter.state import adapter_on, kept_of_tasks, load_method_state
from deal_core.config import AdapterConfig, TrainConfig
from deal_core.data.prompts import encode_prompt
from deal_core.data.schema import TaskSchema
from deal_core.errors import ConfigError
from deal_core.evaluation.generation import generate
from deal_core.method_config import MethodConfig, RehearsalConfig
from deal_core.planning.memory import longest_of
from deal_core.strategies import questions
from deal_core.strategies.deal import Deal
from deal_core.strategies.rehearsal import Question, Rehearsal
from deal_core.strategies.seq_lora import SeqLora
from deal_core.strategies.strategy import PlannedArrival, TaskContext, TaskTexts

LONG = TrainConfig(max_steps=8, batch_size=4, learning_rate=1e-2, max_prompt_tokens=64, checkpoint_steps=4)
SIZES = TaskSchema(name="sizes", labels=("large", "small"), instruction="How big is it?")
SHAPES = TaskSchema(name="shapes", labels=("round", "flat"), instruction="Which shape is it?")
STORY = TaskSchema(name="story", format="completion", instruction="Go on.")
OWN = RehearsalConfig(texts="own")
FIRST = RehearsalConfig(texts="own", answers="first")


def texts(task: TaskSchema, outputs: Sequence[str]) -> TaskTexts:
    rows = [{"input": f"{task.name} number {number}", "output": output} for number, output in enumerate(outputs)]
    return TaskTexts(task=task, rows=Dataset.from_list(rows), max_prompt_tokens=64, max_new_tokens=50)


@pytest.fixture
def arrive(base, task, rows, parent):
    """The rehearsal of a task that arrives after others, and the answers to keep."""

    def make(olds, own, config=FIRST, *, kept=None, new=task):
        context = TaskContext(
            base=base,
            task=new,
            rows=rows(12),
            encoded=rows(12),
            old_tasks=tuple(olds),
            old_texts=tuple(own),
            adapter=AdapterConfig(),
            train=LONG,
        )
        with adapter_on(base.model, parent) as model:
            return make_rehearsal(config, model, context, kept or {}, seed=0)

    return make


@pytest.fixture
def asked(arrive):
    """The rehearsal of a new task over old ones, some of them with texts of their own."""

    def make(olds: Sequence[TaskSchema], own: Sequence[TaskTexts], config: RehearsalConfig = OWN) -> Rehearsal:
        found, _ = arrive(olds, own, config)
        assert found is not None
        return found

    return make


def prompts_of(questions: Sequence[Question]) -> set[tuple[int, ...]]:
    return {tuple(each.prompt_ids) for each in questions}


def expected_prompts(base, task: TaskSchema, inputs: Sequence[str]) -> set[tuple[int, ...]]:
    return {tuple(encode_prompt(base.tokenizer, task, text, 64)) for text in inputs}


def test_a_task_with_texts_is_asked_about_these_and_any_other_about_the_new_ones(asked, base, rows):
    own = texts(SIZES, ["large", "small"] * 5)
    (kind,) = asked([SIZES, SHAPES], [own]).kinds
    by_size = {len(prompts_of(each) & expected_prompts(base, SIZES, own.rows["input"])): each for each in kind}
    assert set(by_size) == {10, 0}
    assert prompts_of(by_size[0]) <= expected_prompts(base, SHAPES, rows(12)["input"])


@pytest.mark.parametrize("last", [0, 2])  # the first task may have arrived again
@pytest.mark.parametrize("config", [OWN, FIRST, RehearsalConfig(), RehearsalConfig(num_texts=6)])
def test_a_plan_knows_how_many_questions_the_parent_answers(arrive, task, config, last):
    olds, own = [SIZES, SHAPES, STORY], [texts(SIZES, ["large", "small"] * 5), texts(STORY, ["this"] * 3)]
    _, kept = arrive(olds, own, config)  # of the task that it learned last, the parent's state has no answers
    kept = {name: tensor for name, tensor in kept.items() if not name.startswith(answers_name(olds[last].name))}
    rehearsal, _ = arrive(olds, own, config, kept=kept)
    num_kept = sum(len(tensor) for name, tensor in kept.items() if name.endswith("lengths_N"))
    made = sum(len(questions) for kind in rehearsal.kinds for questions in kind) - num_kept
    arrival = PlannedArrival(
        task=task,
        old_tasks=tuple(olds),
        old_texts=tuple(own),
        num_rows=12,
        num_steps=LONG.num_steps(12),
        learned_last=olds[last].name,
    )
    assert made == Deal.num_answered(MethodConfig(rehearsal=config), arrival)
    silent = MethodConfig(rehearsal=RehearsalConfig(texts="none"))
    assert Deal.num_answered(silent, arrival) == SeqLora.num_answered(silent, arrival) == 0


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_labels_weigh_in_the_targets_as_much_as_is_said(base, parent, weight):
    own = texts(SIZES, ["large", "small", "small"] * 4)
    first = [base.tokenizer.encode(f" {label}", add_special_tokens=False)[0] for label in SIZES.labels]

    def chances(label_weight: float) -> list[dict[int, float]]:
        with adapter_on(base.model, parent) as model:
            questions, _ = recentred_questions(model, base.tokenizer, own, Random(0), label_weight)
        return [dict(zip(q.tokens_KN[0].tolist(), q.shares_KN[0].tolist(), strict=True)) for q in questions]

    assert len(set(first)) == 2
    for output, before, mixed in zip(own.rows["output"], chances(0.0), chances(weight), strict=True):
        right = first[SIZES.labels.index(output)]
        assert mixed[right] == pytest.approx((1 - weight) * before[right] + weight, abs=1e-5)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_the_targets_have_the_labels_as_often_as_the_texts(asked, base, share):
    """The parent has never learned this task, so that its own answers favour a label."""
    outputs = ["large"] * round(50 * share) + ["small"] * round(50 * (1 - share))
    ((questions,),) = asked([SIZES], [texts(SIZES, outputs)]).kinds
    large = base.tokenizer(" large")["input_ids"][0]
    chances = [
        dict(zip(each.tokens_KN[0].tolist(), each.shares_KN[0].tolist(), strict=True))[large] for each in questions
    ]
    assert sum(chances) / len(chances) == pytest.approx(share, abs=0.15), "ten rows speak for no offset"


def test_a_task_without_labels_is_held_to_the_parents_own_words(asked, base, parent):
    own = texts(STORY, ["whatever was right"] * 6)
    ((questions,),) = asked([STORY], [own]).kinds
    prompts = [encode_prompt(base.tokenizer, STORY, text, 64) for text in own.rows["input"]]
    words = {}
    with adapter_on(base.model, parent) as model:
        for batch, answers, _ in generate(model, base.tokenizer, prompts, 50):
            words |= {tuple(prompts[i]): answer for i, answer in zip(batch, answers, strict=True)}
    assert len(questions) == 6 and all(each.is_parents for each in questions)
    for each in questions:
        answer = words[tuple(each.prompt_ids)]
        assert list(each.answer_ids) == list(answer[: len(each.answer_ids)])


@pytest.mark.parametrize("config", [OWN, RehearsalConfig()])
def test_a_new_tasks_short_answers_do_not_cut_those_of_an_old_task(arrive, monkeypatch, config):
    own = [texts(STORY, ["whatever was right"] * 6)] if config == OWN else []
    lengths = []
    for limit in (50, 2):
        monkeypatch.setattr(sys.modules[__name__], "LONG", replace(LONG, max_answer_tokens=limit))
        found, _ = arrive([STORY], own, config)
        lengths.append([len(each.answer_ids) for kind in found.kinds for questions in kind for each in questions])
    assert max(lengths[0]) > 2 and lengths[1] == lengths[0]


def test_the_labels_of_the_texts_themselves_are_not_learned(parent, train):
    """Only the counts of the labels are used, so other rows may have them."""
    first, second = texts(SIZES, ["large"] * 3 + ["small"] * 9), texts(SIZES, ["small"] * 9 + ["large"] * 3)
    found = [
        load_file(
            train("deal", parent, train=LONG, rehearsal=OWN, old_tasks=(SIZES,), old_texts=[own]).folder
            / "adapter_model.safetensors"
        )
        for own in (first, second, texts(SIZES, ["large"] * 9 + ["small"] * 3))
    ]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert not all(torch.equal(found[0][name], found[2][name]) for name in found[0])


def test_a_task_in_the_new_ones_words_is_held_by_its_own_texts(parent, train, task):
    alike = replace(task, name="alike")
    given = {"rehearsal": OWN, "old_tasks": (alike,)}
    (_, note, *_) = train("deal", parent, **{**given, "old_tasks": (SIZES, alike)}).result.notes
    assert note.endswith(": alike")
    own = [texts(alike, list(task.labels) * 4)]
    notes = train("deal", parent, **given, old_texts=own).result.notes
    assert "rehearsed 12 questions about old tasks (sets: 1)" in notes[0]
    assert not any("not rehearsed" in note for note in notes)


def targets(rehearsal: Rehearsal) -> dict[tuple[int, ...], list[list[float]]]:
    """The targets of all questions, by prompt, without tokens of share 0."""
    return {
        tuple(each.prompt_ids): [
            list(each.answer_ids),
            each.tokens_KN[each.shares_KN > 0].tolist(),
            each.shares_KN[each.shares_KN > 0].tolist(),
        ]
        for kind in rehearsal.kinds
        for questions in kind
        for each in questions
    }


def test_first_answers_are_asked_for_once(arrive, monkeypatch):
    olds, own = [SIZES, STORY], [texts(SIZES, ["large", "small"] * 5), texts(STORY, ["this"] * 4)]
    first, kept = arrive(olds, own)
    asked = []
    ask = questions._asked
    monkeypatch.setattr(questions, "_asked", lambda *given: asked.append(given[2].task.name) or ask(*given))
    again, kept_again = arrive(olds, own, kept=kept)
    assert asked == [] and len(targets(first)) == 14 and targets(again) == targets(first)
    assert kept.keys() == kept_again.keys() and all(torch.equal(kept[name], kept_again[name]) for name in kept)
    other = [own[0], texts(STORY, ["this"] * 3)]  # other texts than those whose answers are kept
    _, after = arrive(olds, other, kept=kept)
    assert asked == ["story"] and after[f"{answers_name('story')}lengths_N"].shape == (3,)


def test_a_task_that_arrives_again_is_asked_again_later(arrive):
    own = [texts(SIZES, ["large", "small"] * 5), texts(SHAPES, ["round", "flat"] * 5)]
    _, kept = arrive([SIZES, SHAPES], own)
    _, after = arrive([SIZES, SHAPES], own, kept=kept, new=SIZES)
    assert {name[: len(answers_name("sizes"))] for name in kept} == {answers_name("sizes"), answers_name("shapes")}
    assert {name[: len(answers_name("sizes"))] for name in after} == {answers_name("shapes")}


def test_a_version_keeps_the_answers_with_its_adapter(parent, train):
    """The third version is held to what the first said, whatever the second says."""
    given = {
        "rehearsal": FIRST,
        "old_tasks": (SIZES,),
        "train": LONG,
        "old_texts": [texts(SIZES, ["large", "small"] * 5)],
    }
    second = train("deal", parent, **given)
    third = train("deal", second.folder, **given)
    states = [load_method_state(each.folder) for each in (second, third)]
    assert [state.stores for state in states] == ["data", "data"]
    first, later = (state.tensors for state in states)
    assert len(first) == 5 and all(torch.equal(first[name], later[name]) for name in first)
    assert kept_of_tasks(third.folder).keys() == first.keys()
    with_parents = train("deal", second.folder, **{**given, "rehearsal": OWN})
    assert load_method_state(with_parents.folder).tensors == {}
    assert third.losses != with_parents.losses


@pytest.mark.parametrize("config", [OWN, FIRST])
def test_a_killed_run_ends_with_the_same_losses(parent, train, killed_and_resumed, config):
    given = {
        "train": LONG,
        "rehearsal": config,
        "old_tasks": (SIZES, SHAPES),
        "old_texts": [texts(SIZES, ["large", "small"] * 5)],
    }
    whole = train("deal", parent, **given)
    resumed = killed_and_resumed("deal", parent, at=6, **given)
    assert resumed.result.resumed_from_step == 4 and resumed.losses == whole.losses


def test_a_plan_counts_the_longest_text_of_an_old_task(base, task, rows):
    long = TaskTexts(
        task=SIZES,
        rows=Dataset.from_dict({"input": ["and more " * 40], "output": ["large"]}),
        max_prompt_tokens=60,
        max_new_tokens=50,
    )
    alone, with_texts = (
        longest_of(rows(12), base.tokenizer, task, (SIZES,), LONG, 8, each).num_tokens for each in ((), [long])
    )
    assert alone < 60 < with_texts, "a prompt as long as the limit, and an answer"


def test_the_next_arrival_asks_in_another_order(parent, train, monkeypatch):
    """More texts than the steps ask: otherwise the same few would be asked by every arrival."""
    asked: list[list[tuple[int, ...]]] = []
    make = questions.make_rehearsal

    def record(*given):
        made, answers = make(*given)
        asked.append([tuple(each.prompt_ids) for step in range(2) for each in made.draw(step)])
        return made, answers

    monkeypatch.setattr(questions, "make_rehearsal", record)
    given = {"rehearsal": OWN, "old_tasks": (SIZES,), "old_texts": [texts(SIZES, ["large"] * 40)]}
    train("deal", train("deal", parent, **given).folder, **given)
    assert len(asked) == 2 and asked[0] != asked[1]


def test_first_answers_need_texts_of_their_own():
    first = RehearsalConfig(answers="first")  # a spec may read the memory from its lineage later
    assert first.with_memory("tests").keeps_answers
    for refuse in (lambda: first.with_memory("none"), lambda: MethodConfig(rehearsal=first)):
        with pytest.raises(ConfigError, match=r"rehearsal\.answers is first, .* set memory to tests"):
            refuse()


def test_re_centred_answers_have_no_temperature():
    with pytest.raises(ConfigError, match=r"rehearsal\.temperature is 2\.0, .* set it to 1"):
        RehearsalConfig(texts="own", temperature=2.0)
