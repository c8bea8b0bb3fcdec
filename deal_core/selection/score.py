"""The interface of all scores, one number per row by which rows are chosen, and random numbers.

Shapes: N candidate rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import Tensor

from deal_core.data.schema import TaskSchema
from deal_core.evaluation.likelihood import MeasuredAnswers
from deal_core.plugins import check_options


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """The rows of an arrival that are scored."""

    rows: Dataset
    """Training rows with the columns input and output."""
    task: TaskSchema
    measured: MeasuredAnswers | None
    """What the parent makes of each row; None unless the score reads the model."""
    seed: int


class RowScore:
    """A number for every candidate row. The rows with the largest numbers are trained on."""

    name: ClassVar[str]
    reads_model: ClassVar[bool] = False
    """Whether the score needs `Candidates.measured`: the parent reads every candidate row once."""
    Options: ClassVar[type[Any] | None] = None
    """The class of the score's own settings, `selection.score_options` in a spec. It is made by
    `deal_core.limits.settings("selection.score_options")`, so it checks them; None: there are none."""

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        self.options = check_options(f"Score {self.name!r}", self.Options, options or {})

    def score(self, candidates: Candidates) -> Tensor:
        """Return finite numbers, shape (N,), in the order of the rows."""
        raise NotImplementedError

    def notes(self, candidates: Candidates) -> Sequence[str]:
        """Return remarks for people about the rows that were scored."""
        del candidates
        return ()


class RandomScore(RowScore):
    """A random number: the baseline of every other score."""

    name = "random"

    def score(self, candidates: Candidates) -> Tensor:
        """Return uniform numbers of [0, 1)."""
        generator = torch.Generator().manual_seed(candidates.seed)
        return torch.rand(len(candidates.rows), generator=generator, dtype=torch.float64)
