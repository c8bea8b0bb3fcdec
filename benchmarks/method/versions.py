"""Versions of an adapter that learn tasks of the benchmark, and their scores on development rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset

from benchmarks.continual.suites import SuiteTask
from benchmarks.method.asked import TaskTexts, further_rows
from deal_core.adapter.state import adapter_on
from deal_core.base_model.load import BaseModel
from deal_core.config import AdapterConfig, TrainConfig
from deal_core.data.schema import TaskSchema
from deal_core.evaluation.answering import ServedTask
from deal_core.evaluation.score import TaskEvaluation, evaluate_task
from deal_core.method_config import MethodConfig
from deal_core.training.train import TrainingResult, TrainingSetup, train_adapter


def train_into(
    folder: Path,
    base: BaseModel,
    rows: Dataset,
    setup: TrainingSetup,
    parent: Path | None = None,
    *,
    joined: Sequence[tuple[TaskSchema, Dataset]] = (),
    old_texts: Sequence[TaskTexts] = (),
) -> TrainingResult:
    """Train an adapter into a folder; its checkpoints, if there are any, go there too."""
    with further_rows(old_texts):
        return train_adapter(
            base,
            rows,
            setup,
            parent_folder=parent,
            joined=joined,
            output_folder=folder,
            checkpoint_folder=folder / "checkpoints",
        )


@dataclass(frozen=True)
class Versions:
    """A base model, its tasks, and the folder of their versions."""

    base: BaseModel
    tasks: Sequence[SuiteTask]
    folder: Path
    strategy: str
    train: TrainConfig

    def setup(self, number: int, olds: Sequence[int]) -> TrainingSetup:
        """The training of a task after others, by their numbers, with default settings of the method."""
        return TrainingSetup(
            task=self.tasks[number].schema,
            old_tasks=tuple(self.tasks[old].schema for old in olds),
            strategy=self.strategy,
            adapter=AdapterConfig(),
            method=MethodConfig(),
            train=self.train,
        )

    def rows(self, number: int, first: int, last: int) -> Dataset:
        """Training rows of a task from `first` up to `last`."""
        return Dataset.from_list(list(self.tasks[number].train[first:last]))

    def learn(
        self,
        name: str,
        rows: Dataset,
        setup: TrainingSetup,
        parent: str | None,
        old_texts: Sequence[TaskTexts] = (),
    ) -> str:
        """Train a version on top of another one; return its name."""
        parent_folder = self.folder / parent if parent else None
        train_into(self.folder / name, self.base, rows, setup, parent_folder, old_texts=old_texts)
        return name

    def score(self, name: str, max_test_rows: int) -> dict[str, TaskEvaluation]:
        """Let a version answer the first development rows of every task."""
        scores = {}
        with adapter_on(self.base.model, self.folder / name) as model:
            for task in self.tasks:
                rows = Dataset.from_list(list(task.part("dev", max_test_rows)))
                asked = ServedTask(
                    schema=task.schema, max_prompt_tokens=self.train.max_prompt_tokens, max_new_tokens=20
                )
                scores[task.schema.name] = evaluate_task(model, self.base.tokenizer, asked, rows)
        return scores
