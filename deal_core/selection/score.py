"""The interface of all scores: one number per row, by which rows are chosen.

Shapes: N candidate rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from datasets import Dataset
from torch import Tensor

from deal_core.data.schema import TaskSchema
from deal_core.evaluation.likelihood import MeasuredAnswers
from deal_core.method_config import SelectionConfig


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """The rows of an arrival that are scored.

    Attributes:
        rows: Training rows with the columns input and output.
        task: How a row becomes a prompt.
        measured: What the parent makes of each row; None unless the score reads the model.
        config: The settings under `selection`.
        seed: Seed of all random numbers.
    """

    rows: Dataset
    task: TaskSchema
    measured: MeasuredAnswers | None
    config: SelectionConfig
    seed: int


class RowScore:
    """A number for every candidate row. `selection.pick` says which numbers are taken."""

    name: ClassVar[str]
    reads_model: ClassVar[bool] = False
    """Whether the score needs `Candidates.measured`: the parent reads every candidate row once."""

    def score(self, candidates: Candidates) -> Tensor:
        """Return finite numbers, shape (N,), in the order of the rows."""
        raise NotImplementedError
