"""`deal_asked`: old tasks are asked about texts of their own, about kept rows, or about both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from datasets import Dataset

from benchmarks.method import asked
from benchmarks.method.asked import DealAsked, answers_name
from deal_core.adapter.files import MethodState
from deal_core.adapter.state import adapter_on, load_method_state
from deal_core.benchmark.cell import make_cell
from deal_core.config import AdapterConfig, TrainConfig
from deal_core.data.prompts import encode_prompt
from deal_core.data.schema import TaskSchema
from deal_core.method_config import DealConfig, MethodConfig
from deal_core.strategies import make_strategy
from deal_core.strategies.kept_rows import pack, unpack
from deal_core.strategies.rehearsal import RehearsedRow
from deal_core.strategies.strategy import TaskContext, TaskTexts

pytestmark = pytest.mark.nightly

STEPS = TrainConfig(max_steps=8, batch_size=4, learning_rate=1e-2, max_prompt_tokens=64, checkpoint_steps=4)
NEW = TaskSchema(name="new", labels=("a", "b"))
SIZES = TaskSchema(name="sizes", labels=("large", "small"), instruction="How big is it?")
SHAPES = TaskSchema(name="shapes", labels=("round", "flat"), instruction="Which shape is it?")
STORY = TaskSchema(name="story", format="completion", instruction="Go on.")
Arrive = Callable[..., DealAsked]


def texts(task: TaskSchema, outputs: Sequence[str]) -> TaskTexts:
    rows = [{"input": f"{task.name} number {number}", "output": output} for number, output in enumerate(outputs)]
    return TaskTexts(task=task, rows=Dataset.from_list(rows), max_prompt_tokens=64, max_new_tokens=50)


@pytest.fixture
def arrive(base, rows, parent) -> Arrive:
    """Return the strategy, prepared for a task that arrives after others, some of them with texts of their own."""

    def make(
        olds: Sequence[TaskSchema],
        own: Sequence[TaskTexts] = (),
        tensors: dict[str, torch.Tensor] | None = None,
        train: TrainConfig = STEPS,
        **options: object,
    ) -> DealAsked:
        context = TaskContext(
            base=base,
            task=NEW,
            rows=rows(6),
            encoded=rows(6),
            old_tasks=tuple(olds),
            old_texts=tuple(own),
            adapter=AdapterConfig(),
            train=train,
        )
        config = MethodConfig(deal=DealConfig(core="free"), strategy_options=options)
        strategy = make_strategy("deal_asked", config, 0)
        assert isinstance(strategy, DealAsked)
        with adapter_on(base.model, parent) as model:
            state = MethodState(strategy="deal_asked", stores=strategy.stores, tensors=tensors or {})
            strategy.prepare(model, state, context)
        return strategy

    return make


def prompts_of(rows: Sequence[RehearsedRow]) -> set[tuple[int, ...]]:
    return {tuple(row.prompt_ids) for row in rows}


def expected_prompts(base, task: TaskSchema, inputs: Sequence[str]) -> set[tuple[int, ...]]:
    return {tuple(encode_prompt(base.tokenizer, task, text, 64)) for text in inputs}


def test_a_task_with_texts_is_asked_about_these_and_any_other_about_the_new_ones(arrive, base, rows):
    own = texts(SIZES, ["large", "small"] * 5)
    sets = arrive([SIZES, SHAPES], [own], texts="own").rehearsal().sets
    about_new, about_own = sorted(sets, key=len)
    assert prompts_of(about_own) == expected_prompts(base, SIZES, own.rows["input"])
    assert prompts_of(about_new) == expected_prompts(base, SHAPES, rows(6)["input"])


def test_the_labels_of_the_texts_themselves_are_not_learned(arrive):
    """Only the counts of the labels are used, so other rows may have them."""

    def targets(outputs: Sequence[str]) -> dict[tuple[int, ...], torch.Tensor]:
        (asked_rows,) = arrive([SIZES], [texts(SIZES, outputs)], texts="own").rehearsal().sets
        return {tuple(row.prompt_ids): row.shares_KN[0] for row in asked_rows}

    one, other = targets(["large"] * 3 + ["small"] * 9), targets(["small"] * 9 + ["large"] * 3)
    third = targets(["large"] * 9 + ["small"] * 3)
    assert all(torch.equal(one[prompt], other[prompt]) for prompt in one)
    assert not all(torch.equal(one[prompt], third[prompt]) for prompt in one)


def test_first_answers_are_kept_and_not_asked_for_again(arrive, monkeypatch):
    olds, own = [SIZES, STORY], [texts(SIZES, ["large", "small"] * 5), texts(STORY, ["this"] * 4)]
    options = {"texts": "own", "answers": "first"}
    first = arrive(olds, own, **options)
    kept, names, ask = first.finish().tensors, [], asked.asked
    monkeypatch.setattr(asked, "asked", lambda *given: names.append(given[2].task.name) or ask(*given))
    again = arrive(olds, own, kept, **options)

    def targets(strategy: DealAsked) -> set[tuple[object, ...]]:
        rows = [row for rows in strategy.rehearsal().sets for row in rows]
        return {(*row.prompt_ids, *row.answer_ids, *row.shares_KN[row.shares_KN > 0].tolist()) for row in rows}

    assert names == [] and len(targets(first)) == 14 and targets(again) == targets(first)
    assert again.finish().tensors.keys() == kept.keys()
    other = arrive(olds, [own[0], texts(STORY, ["this"] * 3)], kept, **options)  # other texts than those of the answers
    assert names == ["story"]
    assert other.finish().tensors[f"{answers_name('story')}lengths_N"].shape == (3,)


def test_a_version_keeps_the_first_answers_with_its_adapter(parent, train):
    """The third version is held to what the first said, whatever the second says."""
    own = [texts(SIZES, ["large", "small"] * 5)]
    given = {
        "strategy_options": {"texts": "own", "answers": "first"},
        "old_tasks": (SIZES,),
        "train": STEPS,
        "old_texts": own,
    }
    second = train("deal_asked", parent, **given)
    third = train("deal_asked", second.folder, **given)
    before, after = (load_method_state(run.folder) for run in (second, third))
    assert before.stores == after.stores == "data" and len(before.tensors) == 5
    assert all(torch.equal(before.tensors[name], after.tensors[name]) for name in before.tensors)
    assert not any("is gone" in note for note in third.result.notes)
    with_parents = train("deal_asked", second.folder, **{**given, "strategy_options": {"texts": "own"}})
    assert load_method_state(with_parents.folder).tensors == {} and third.losses != with_parents.losses


@pytest.mark.parametrize("num_stored", [1, 3])
def test_both_asks_half_by_labels_of_stored_rows_and_half_by_the_parents_answers(num_stored, arrive):
    """This holds for any number of old tasks with rows, and of tasks that can be asked about the arrival's texts."""
    stored = {
        f"kept_rows.{number:04d}": pack([RehearsedRow([1, row], [row]) for row in range(40)])
        for number in range(num_stored)
    }
    stored["kept_rows.0003"] = pack([])  # of a task that was forgotten
    rehearsal = arrive([SIZES], (), stored, replace(STEPS, max_steps=2), texts="both").rehearsal()
    by_label, (by_parent,) = rehearsal.kinds
    assert [sorted(row.answer_ids[0] for row in rows) for rows in by_label] == [list(range(40))] * num_stored
    assert len(by_parent) == 4, "as many as two steps use"
    drawn = [row.tokens_KN is None for step in range(6) for row in rehearsal.draw(step)]
    assert sum(drawn) == len(drawn) / 2 == 12


@pytest.mark.parametrize("kind", ["stored", "both"])
def test_stored_rows_have_a_share_and_a_limit_and_no_shared_first_version(train, kind):
    for options, num_rows in (({"stored_share": 0.5}, 12), ({"stored_share": 0.5, "max_stored_rows": 3}, 3)):
        given = {"strategy_options": {"texts": kind, **options}, "train": replace(STEPS, max_steps=1)}
        second = train("deal_asked", train("deal_asked", **given).folder, **given)
        state = load_method_state(second.folder)
        assert state.stores == "data" and [len(unpack(rows)) for rows in state.tensors.values()] == [num_rows] * 2
    cell = make_cell(
        "deal_asked",
        ("a", "b"),
        method=MethodConfig(strategy_options={"texts": kind}),
        seed=0,
        rows=9,
        part="dev",
        max_test_rows=None,
        scored="all",
        train=STEPS,
        adapter=AdapterConfig(),
        base="b",
        data="d",
    )
    assert cell.shared_digest() is None, "its first version has rows, which that of plain LoRA has not"


def test_a_killed_run_ends_with_the_same_losses(parent, train, killed_and_resumed):
    given = {
        "train": STEPS,
        "strategy_options": {"texts": "own", "answers": "first"},
        "old_tasks": (SIZES, SHAPES),
        "old_texts": [texts(SIZES, ["large", "small"] * 5)],
    }
    whole = train("deal_asked", parent, **given)
    resumed = killed_and_resumed("deal_asked", parent, at=6, **given)
    assert resumed.result.resumed_from_step == 4 and resumed.losses == whole.losses
