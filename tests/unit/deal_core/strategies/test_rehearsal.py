"""Rehearsal: which questions are drawn, what their loss is, and that old answers stay."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from deal_core.strategies.questions import choose_kept, make_rehearsal, tasks_to_ask
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from benchmarks.method.rivals import ask
from deal_core.adapter.state import adapter_on, load_method_state
from deal_core.config import AdapterConfig, TrainConfig
from deal_core.data.collate import AnswerCollator
from deal_core.data.schema import TaskSchema
from deal_core.evaluation.generation import first_answer_logits
from deal_core.method_config import DealConfig, RehearsalConfig
from deal_core.strategies.rehearsal import Question, Rehearsal, pack, unpack
from deal_core.strategies.strategy import TaskContext

OLD = TaskSchema(name="sizes", labels=("large", "small"), instruction="How big is it?")
LONG = TrainConfig(max_steps=20, batch_size=4, learning_rate=1e-2, max_prompt_tokens=64, checkpoint_steps=0)


@pytest.fixture
def collate(base):
    return AnswerCollator(base.tokenizer, is_seq2seq=False)


def question(base, prompt: str, answer: str) -> Question:
    ids = [base.tokenizer(text)["input_ids"] for text in (prompt, answer)]
    return Question(*ids)


def rehearsal(tasks, collate, **changes) -> Rehearsal:
    given = {"num_rows": 4, "weight": 1.0, "temperature": 1.0, "seed": 0, **changes}
    return Rehearsal([tasks], collate, **given)


def test_every_task_is_asked_as_often_as_any_other_whatever_it_holds(collate):
    one, many = [Question([1], [2])], [Question([3], [4])] * 50
    drawn = [q for step in range(50) for q in rehearsal([one, many, []], collate, num_rows=3).draw(step)]
    assert sum(q.prompt_ids == [1] for q in drawn) == len(drawn) / 2


def test_a_question_comes_again_only_after_all_others_of_its_task(collate):
    asked = rehearsal([[Question([i], [i]) for i in range(10)], [Question([100], [100])]], collate)
    drawn = [q.prompt_ids[0] for step in range(5) for q in asked.draw(step)]
    assert sorted(drawn) == [*range(10), *[100] * 10]


def test_what_is_drawn_follows_from_seed_and_step_alone(collate):
    tasks = [[Question([i], [i]) for i in range(40)]]
    assert rehearsal(tasks, collate).draw(7) == rehearsal(tasks, collate).draw(7)
    assert rehearsal(tasks, collate).draw(7) != rehearsal(tasks, collate).draw(8)
    assert rehearsal(tasks, collate).draw(7) != rehearsal(tasks, collate, seed=1).draw(7)


def test_nothing_to_ask_is_no_loss(base, collate):
    assert rehearsal([[], []], collate).loss(base.model, 0) is None


def test_loss_is_the_divergence_from_the_kept_distribution(base, collate):
    """Compared with KL over the whole vocabulary, at both ends of a padded batch; the cut tail is small."""
    questions = [question(base, "a long prompt about the sea and more", "red"), question(base, "short", "blue sky")]
    with torch.no_grad():
        answered = ask(base.model, collate, questions, temperature=2.0)
        for parameter in base.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))

    def exact(q: Question) -> torch.Tensor:
        start, end = len(q.prompt_ids), len(q.prompt_ids) + len(q.answer_ids)
        logits = base.model(input_ids=torch.tensor([[*q.prompt_ids, *q.answer_ids]])).logits[0, start - 1 : end - 1]
        model = (logits / 2.0).log_softmax(-1)
        kept = model.gather(-1, q.tokens_KN)
        rest_p, rest_q = 1 - q.shares_KN.sum(-1), 1 - kept.exp().sum(-1)
        return (q.shares_KN * (q.shares_KN.log() - kept)).sum() + (rest_p * (rest_p.log() - rest_q.log())).sum()

    drawn = rehearsal([answered], collate, temperature=2.0, weight=3.0)
    batch = drawn.draw(0)
    expected = 3 * 4 * sum(exact(q) for q in batch) / sum(len(q.answer_ids) for q in batch)
    torch.testing.assert_close(drawn.loss(base.model, 0), expected, rtol=1e-3, atol=1e-5)
    assert expected > 0.01


def test_loss_of_an_unmoved_model_is_nothing(base, collate):
    answered = ask(base.model, collate, [question(base, "about grass", "green")], temperature=1.0)
    assert rehearsal([answered], collate).loss(base.model, 0).abs() < 1e-4


def test_an_answer_without_distribution_is_learned_as_a_label(base, collate):
    q = question(base, "about grass", "green leaf")
    logits = base.model(input_ids=torch.tensor([[*q.prompt_ids, *q.answer_ids]])).logits[0, len(q.prompt_ids) - 1 : -1]
    expected = cross_entropy(logits, torch.tensor(q.answer_ids))
    torch.testing.assert_close(rehearsal([[q]], collate).loss(base.model, 0), expected)


def test_packed_rows_come_back():
    questions = [Question([5, 6, 7], [8]), Question([9], [10, 11])]
    assert unpack(pack(questions)) == questions


@pytest.mark.parametrize("strategy", ["deal"])
def test_old_answers_drift_less_when_they_are_asked_for(base, strategy, train, parent, rows):
    """`parent` has some answers to OLD. With rehearsal, learning the colours again must change these answers less."""

    def drift(config: RehearsalConfig) -> float:
        folder = train(strategy, parent, train=LONG, rehearsal=config, old_tasks=(OLD,)).folder
        shares = []
        for where in (parent, folder):
            with adapter_on(base.model, where) as model:
                logits = [
                    first_answer_logits(model, base.tokenizer, OLD, row["input"], max_prompt_tokens=64)
                    for row in rows(6, first=50)
                ]
            shares.append(torch.stack(logits).log_softmax(-1))
        return float((shares[0].exp() * (shares[0] - shares[1])).sum())

    assert drift(RehearsalConfig(texts="arrival", weight=5.0)) < 0.5 * drift(RehearsalConfig(texts="none"))


@pytest.mark.parametrize(
    "change",
    [{"texts": "none"}, {"num_texts": 3}, {"rows_per_step": 1}, {"weight": 0.1}, {"temperature": 3.0}],
    ids=str,
)
def test_every_setting_changes_the_result(change, trained_once):
    default, changed = (
        load_file(trained_once(rehearsal=config, old_tasks=(OLD,)).folder / "adapter_model.safetensors")
        for config in (RehearsalConfig(), RehearsalConfig(**change))
    )
    assert any(not torch.allclose(default[name], changed[name], rtol=1e-5, atol=1e-7) for name in default)


@pytest.mark.parametrize(("num_old", "num_texts", "expected"), [(1, 256, 16), (4, 256, 4), (3, 6, 2)])
def test_no_more_questions_are_made_than_the_steps_put(num_old, num_texts, expected, parent, train):
    """Four steps of four questions: the cost of an arrival does not grow with the number of old tasks."""
    olds = [TaskSchema(name=f"old-{i}", labels=("large", "small"), instruction=f"How big? {i}") for i in range(num_old)]
    done = train("deal", parent, rehearsal=RehearsalConfig(num_texts=num_texts), old_tasks=olds)
    note = f"rehearsed {expected * num_old} questions about old tasks (sets: {num_old}), 4 a step"
    assert done.result.notes[0] == note


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


def test_notes_name_the_old_tasks_that_nothing_is_asked_about(parent, train, task):
    alike = TaskSchema(name="alike", labels=task.labels[::-1], instruction=task.instruction + " ")
    notes = train("deal", parent, deal=DealConfig(core="free"), old_tasks=(OLD, alike)).result.notes
    assert "about old tasks (sets: 1)" in notes[0] and notes[1].endswith(": alike")
    assert len(train("deal", parent, deal=DealConfig(core="free"), old_tasks=(OLD,)).result.notes) == 1
    both = RehearsalConfig(texts="both")
    second = train("deal", train("deal", rehearsal=both).folder, rehearsal=both, old_tasks=(alike,))
    assert second.result.notes[1].startswith("rehearsed on stored rows only")


def test_deal_keeps_rows_only_when_asked_to(parent, train):
    assert load_method_state(train("deal", parent).folder).stores == "nothing"
    for texts in ("stored", "both"):
        state = load_method_state(train("deal", rehearsal=RehearsalConfig(texts=texts, stored_share=0.5)).folder)
        assert state.stores == "data" and [len(unpack(value)) for value in state.tensors.values()] == [12]


def test_what_recycling_does_to_old_answers_is_said_before_the_first_step(parent, train, base, task, rows):
    """The untouched parent has no drift; an adapter whose slots were emptied has."""
    (said,) = (note for note in train("deal", parent, old_tasks=(OLD,)).result.notes if "recycling" in note)
    assert float(re.search(r"to the parent's: ([0-9.]+) per token", said)[1]) > 0
    with adapter_on(base.model, parent) as model:
        context = TaskContext(
            base=base,
            task=task,
            rows=rows(6),
            encoded=rows(6),
            old_tasks=(OLD,),
            adapter=AdapterConfig(),
            train=LONG,
        )
        rehearsal, _ = make_rehearsal(RehearsalConfig(), model, context, {}, seed=0)
        assert rehearsal.drift(model) == pytest.approx(0, abs=1e-4)
        stored = {"rows.0000": pack([Question([1], [2])])}
        assert make_rehearsal(RehearsalConfig(texts="stored"), model, context, stored, seed=0)[0].drift(model) is None


def test_rehearsed_run_resumes(train, parent, killed_and_resumed):
    steps = TrainConfig(max_steps=8, batch_size=4, learning_rate=1e-2, max_prompt_tokens=64, checkpoint_steps=4)
    given = {"train": steps, "rehearsal": RehearsalConfig(texts="arrival"), "old_tasks": (OLD,)}
    whole = train("deal", parent, **given)
    assert killed_and_resumed("deal", parent, at=6, **given).losses == pytest.approx(whole.losses, rel=1e-5)


def test_stored_rows_are_put_in_another_order_by_every_arrival(base, parent, rows):
    """Otherwise, with fewer steps than rows, the same few rows would be asked every time, and the others never."""
    kept = [pack([Question([task, row], [row]) for row in range(40)]) for task in range(3)]
    put = []
    with adapter_on(base.model, parent) as model:
        context = TaskContext(
            base=base,
            task=TaskSchema(name="new", labels=("a", "b")),
            rows=rows(6),
            encoded=rows(6),
            old_tasks=(OLD,),
            adapter=AdapterConfig(),
            train=LONG,
        )
        for num_tasks in (1, 2, 3):
            stored = {f"rows.{number:04d}": kept[number] for number in range(num_tasks)}
            tasks = make_rehearsal(RehearsalConfig(texts="stored"), model, context, stored, seed=0)[0].kinds[0]
            first = [question.prompt_ids for questions in tasks for question in questions[:10]]
            put.append({row for task, row in first if task == 0})
    assert len({frozenset(rows) for rows in put}) == 3


@pytest.mark.parametrize("num_stored", [1, 3])
def test_both_asks_half_by_labels_of_stored_rows_and_half_by_the_parents_answers(num_stored, base, parent, rows):
    """This holds for any number of old tasks with rows, and of tasks that can be asked about the arrival's texts."""
    stored = {f"rows.{n:04d}": pack([Question([1, row], [row]) for row in range(40)]) for n in range(num_stored)}
    stored["rows.0003"] = pack([])  # of a task that was forgotten
    with adapter_on(base.model, parent) as model:
        context = TaskContext(
            base=base,
            task=TaskSchema(name="new", labels=("a", "b")),
            rows=rows(6),
            encoded=rows(6),
            old_tasks=(OLD,),
            adapter=AdapterConfig(),
            train=replace(LONG, max_steps=2),
        )
        rehearsal, _ = make_rehearsal(RehearsalConfig(texts="both"), model, context, stored, seed=0)
    by_label, (by_parent,) = rehearsal.kinds
    assert [sorted(q.answer_ids[0] for q in questions) for questions in by_label] == [list(range(40))] * num_stored
    assert len(by_parent) == 4, "as many as two steps put"
    drawn = [q.tokens_KN is None for step in range(6) for q in rehearsal.draw(step)]
    assert sum(drawn) == len(drawn) / 2 == 12


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_parent_is_asked_once_and_its_answer_held_as_it_was(temperature, base, parent, task, rows):
    """Generation's distribution at each token equals that of a pass over prompt and answer."""
    with adapter_on(base.model, parent) as model:
        context = TaskContext(
            base=base,
            task=TaskSchema(name="new", labels=("a", "b")),
            rows=rows(6),
            encoded=rows(6),
            old_tasks=(task,),
            adapter=AdapterConfig(),
            train=replace(LONG, max_steps=2),
        )
        config = RehearsalConfig(temperature=temperature)
        ((questions,),) = make_rehearsal(config, model, context, {}, seed=0)[0].kinds
        plain = [Question(q.prompt_ids, q.answer_ids) for q in questions]
        again = ask(model, context.collator(), plain, temperature=temperature)
    assert len(questions) == 6 and all(base.tokenizer.eos_token_id not in q.answer_ids[:-1] for q in questions)
    for one, other in zip(questions, again, strict=True):
        assert torch.equal(one.tokens_KN[:, 0], other.tokens_KN[:, 0])
        torch.testing.assert_close(one.shares_KN, other.shares_KN, rtol=1e-3, atol=1e-5)


def test_old_tasks_that_are_asked_together_answer_as_each_alone(base, parent, rows, monkeypatch):
    olds = (
        TaskSchema(name="short", labels=("a", "b"), instruction="Which is it?"),
        TaskSchema(name="long", labels=("very large indeed", "small"), instruction="How big would you say it is?"),
        TaskSchema(name="third", labels=("red", "blue sky"), instruction="Of what colour?"),
    )
    found = []
    with adapter_on(base.model, parent) as model:
        context = TaskContext(
            base=base,
            task=TaskSchema(name="new", labels=("a", "b")),
            rows=rows(6),
            encoded=rows(6),
            old_tasks=olds,
            adapter=AdapterConfig(),
            train=replace(LONG, max_steps=4),
        )
        for min_sharing in (0, 1000):
            monkeypatch.setattr("deal_core.strategies.questions.MIN_SHARING", min_sharing)
            found.append(make_rehearsal(RehearsalConfig(), model, context, {}, seed=0)[0].kinds[0])
    alone, together = found
    assert [len(task) for task in together] == [6, 6, 6]
    assert len({len(question.answer_ids) for task in alone for question in task}) > 1, "limits differ"
    for one, other in zip(itertools.chain(*alone), itertools.chain(*together), strict=True):
        assert (one.prompt_ids, one.answer_ids) == (other.prompt_ids, other.answer_ids)
        assert torch.equal(one.tokens_KN[:, 0], other.tokens_KN[:, 0])
        torch.testing.assert_close(one.shares_KN, other.shares_KN, rtol=1e-3, atol=1e-5)


def test_the_parent_is_asked_without_dropout(base, collate):
    base.model.train()
    try:
        ask(base.model, collate, [question(base, "about grass", "green")], temperature=1.0)
        assert not base.model.training
    finally:
        base.model.eval()


def test_kept_rows_have_a_limit_per_arrival(train):
    few = RehearsalConfig(texts="stored", stored_share=0.5, max_stored_rows=3)
    first = train("deal", rehearsal=few)
    second = load_method_state(train("deal", first.folder, rehearsal=few).folder)
    assert [len(unpack(value)) for value in second.tensors.values()] == [3, 3]


def test_kept_rows_hold_every_label_in_its_share(train, rows, base):
    """A plain sample of 24 rows by chance holds one label more often than another."""
    fair = RehearsalConfig(texts="stored", stored_share=0.5, balance_stored=True)
    for seed in range(3):
        folder = train("deal", rehearsal=fair, train=replace(LONG, max_steps=1, seed=seed)).folder
        (packed,) = load_method_state(folder).tensors.values()
        counts = Counter(tuple(question.answer_ids) for question in unpack(packed))
        assert set(counts.values()) == {12 // len(counts)}
    labels, fair = [number % 14 for number in range(150)], replace(fair, stored_share=0.1)
    drawn = [[labels[place] for place in choose_kept(fair, labels, seed)] for seed in range(20)]
    assert all(len(kept) == 15 and len({*kept}) >= 13 for kept in drawn)
