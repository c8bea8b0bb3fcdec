"""Versions of an adapter that learn tasks of the benchmark, and their scores on development rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset

from deal_core.adapter.state import adapter_on
from deal_core.base_model.load import BaseModel
from deal_core.benchmark.suites import SuiteTask
from deal_core.config import AdapterConfig, EvaluateConfig, TrainConfig
from deal_core.evaluation.score import TaskEvaluation, evaluate_task
from deal_core.method_config import MethodConfig
from deal_core.strategies.strategy import TaskTexts
from deal_core.training.train import TrainingSetup, train_adapter


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
        train_adapter(
            self.base,
            rows,
            setup,
            parent_folder=self.folder / parent if parent else None,
            old_texts=old_texts,
            output_folder=self.folder / name,
            checkpoint_folder=self.folder / f"{name}-checkpoints",
        )
        return name

    def score(self, name: str, max_test_rows: int) -> dict[str, TaskEvaluation]:
        """Let a version answer the first development rows of every task."""
        found = {}
        with adapter_on(self.base.model, self.folder / name) as model:
            for task in self.tasks:
                rows = Dataset.from_list(list(task.part("dev", max_test_rows)))
                found[task.schema.name] = evaluate_task(
                    model,
                    self.base.tokenizer,
                    task.schema,
                    rows,
                    EvaluateConfig(max_new_tokens=20),
                    max_prompt_tokens=self.train.max_prompt_tokens,
                )
        return found
