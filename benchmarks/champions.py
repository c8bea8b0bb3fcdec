"""What the benchmarks of the gate train: small champions by `deal` with its defaults, on a labelled task."""

from __future__ import annotations

from collections.abc import Sequence

from deal_core.config import AdapterConfig, TrainConfig
from deal_core.data.schema import TaskSchema
from deal_core.evaluation.answering import ServedTask
from deal_core.method_config import MethodConfig
from deal_core.training.train import TrainingSetup


def champion_of(
    name: str, labels: Sequence[str], instruction: str, *, epochs: int, longest: int, seed: int
) -> tuple[TrainingSetup, ServedTask]:
    """Return how a champion of a task learns, and how it is asked; `longest` is the most tokens of a prompt."""
    task = TaskSchema(name=name, labels=tuple(labels), instruction=instruction)
    train = TrainConfig(num_epochs=epochs, max_prompt_tokens=longest, checkpoint_steps=0, seed=seed)
    setup = TrainingSetup(task=task, strategy="deal", adapter=AdapterConfig(), method=MethodConfig(), train=train)
    asked = ServedTask(schema=task, max_prompt_tokens=longest, max_new_tokens=train.answer_tokens(task.labels))
    return setup, asked
