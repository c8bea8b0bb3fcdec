"""The training of one version of an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset

from deal_core.base_model.load import BaseModel
from deal_core.data.schema import TaskSchema
from deal_core.training.train import TrainingResult, TrainingSetup, train_adapter


def train_into(
    folder: Path,
    base: BaseModel,
    rows: Dataset,
    setup: TrainingSetup,
    parent: Path | None = None,
    *,
    joined: Sequence[tuple[TaskSchema, Dataset]] = (),
) -> TrainingResult:
    """Train an adapter into a folder; its checkpoints, if there are any, go there too."""
    return train_adapter(
        base,
        rows,
        setup,
        parent_folder=parent,
        joined=joined,
        output_folder=folder,
        checkpoint_folder=folder / "checkpoints",
    )
