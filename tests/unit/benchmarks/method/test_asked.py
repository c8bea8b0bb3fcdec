"""`deal_asked`: old tasks are asked about texts of their own, about kept rows, or about both."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from datasets import Dataset

from benchmarks.method.asked import DealAsked, TaskTexts, further_rows
from deal_core.adapter.files import MethodState
from deal_core.adapter.state import adapter_on
from deal_core.config import AdapterConfig, TrainConfig
from deal_core.data.prompts import encode_prompt
from deal_core.data.schema import TaskSchema
from deal_core.method_config import DealConfig, MethodConfig
from deal_core.strategies import make_strategy
from deal_core.strategies.rehearsal import RehearsedRow
from deal_core.strategies.strategy import TaskContext

pytestmark = pytest.mark.nightly

STEPS = TrainConfig(max_steps=8, batch_size=4, learning_rate=1e-2, max_prompt_tokens=64, checkpoint_steps=4)
NEW = TaskSchema(name="new", labels=("a", "b"))
SIZES = TaskSchema(name="sizes", labels=("large", "small"), instruction="How big is it?")
SHAPES = TaskSchema(name="shapes", labels=("round", "flat"), instruction="Which shape is it?")
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
            num_steps=train.num_steps(6),
            adapter=AdapterConfig(),
            train=train,
        )
        config = MethodConfig(deal=DealConfig(core="free"), strategy_options=options)
        strategy = make_strategy("deal_asked", config, 0)
        assert isinstance(strategy, DealAsked)
        with adapter_on(base.model, parent) as model, further_rows(own):
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


def test_a_killed_run_ends_with_the_same_losses(parent, train, killed_and_resumed):
    given = {
        "train": STEPS,
        "strategy_options": {"texts": "own", "answers": "first"},
        "old_tasks": (SIZES, SHAPES),
    }
    with further_rows([texts(SIZES, ["large", "small"] * 5)]):
        whole = train("deal_asked", parent, **given)
        resumed = killed_and_resumed("deal_asked", parent, at=6, **given)
    assert resumed.result.resumed_from_step == 4 and resumed.losses == whole.losses
