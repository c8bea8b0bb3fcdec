"""The rehearsal of a task that arrives after others, made by the parent on the tiny base model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pytest
from datasets import Dataset
from torch import Tensor

from deal_core.adapter.state import adapter_on
from deal_core.base_model.load import BaseModel
from deal_core.config import AdapterConfig, TrainConfig
from deal_core.data.prompts import encode_answer, encode_prompt
from deal_core.data.schema import TaskSchema
from deal_core.method_config import RehearsalConfig
from deal_core.strategies.old_tasks import make_rehearsal
from deal_core.strategies.rehearsal import Rehearsal, RehearsedRow
from deal_core.strategies.strategy import TaskContext

SIZES = TaskSchema(
    name="sizes", labels=("very large", "very small", "tiny indeed"), instruction="How big is it?"
)  # two labels begin alike
STORY = TaskSchema(name="story", format="completion", instruction="Go on.")
NEW = TaskSchema(name="new", labels=("a", "b"))
EIGHT_STEPS = TrainConfig(max_steps=8, batch_size=4, learning_rate=1e-2, max_prompt_tokens=64, checkpoint_steps=4)
MakeContext = Callable[..., TaskContext]
Arrive = Callable[..., Rehearsal | None]


def labelled(task: TaskSchema, num_rows: int) -> Dataset:
    """Rows of a task; its labels, or free answers, take turns."""
    labels = task.labels or ("this and that", "so", "a red sea")
    return Dataset.from_list(
        [{"input": f"{task.name} number {i}", "output": labels[i % len(labels)]} for i in range(num_rows)]
    )


def encoded(base: BaseModel, task: TaskSchema, rows: Dataset, column: str = "output") -> list[RehearsedRow]:
    """Rows as a training keeps them."""
    return [
        RehearsedRow(
            encode_prompt(base.tokenizer, task, row["input"], 64), encode_answer(base.tokenizer, task, row[column], 50)
        )
        for row in rows
    ]


def prompts_of(rows: Sequence[RehearsedRow]) -> set[tuple[int, ...]]:
    return {tuple(row.prompt_ids) for row in rows}


def encoded_prompts(base: BaseModel, task: TaskSchema, inputs: Sequence[str]) -> set[tuple[int, ...]]:
    return {tuple(encode_prompt(base.tokenizer, task, text, 64)) for text in inputs}


@pytest.fixture
def make_context(base, rows) -> MakeContext:
    """What a strategy may read when a task with six rows arrives."""

    def make(
        olds: Sequence[TaskSchema], *, new: TaskSchema = NEW, train: TrainConfig = EIGHT_STEPS, num_rows: int = 6
    ) -> TaskContext:
        return TaskContext(
            base=base,
            task=new,
            rows=rows(num_rows),
            encoded=rows(num_rows),
            old_tasks=tuple(olds),
            num_steps=train.num_steps(num_rows),
            adapter=AdapterConfig(),
            train=train,
        )

    return make


@pytest.fixture
def arrive(base, parent, make_context) -> Arrive:
    """Return the rehearsal of a task that arrives after the tasks `olds`, of which the parent keeps `kept`."""

    def make(
        olds: Sequence[TaskSchema], kept: Mapping[str, Tensor] | None = None, *, per_step: int = 4, **changes: object
    ) -> Rehearsal | None:
        config, context = RehearsalConfig(per_step=per_step), make_context(olds, **changes)
        with adapter_on(base.model, parent) as model:
            return make_rehearsal(config, model, context, kept or {}, seed=0, answer_weight=0.5)

    return make
