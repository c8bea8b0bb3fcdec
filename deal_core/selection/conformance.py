"""A check of the promises that every score makes to the selection, for a package's own tests.

Example:
    >>> def test_mine_keeps_the_promises():  # doctest: +SKIP
    ...     check_score("mine")
"""

from __future__ import annotations

import torch
from datasets import Dataset
from torch import Tensor

from deal_core.data.schema import TaskSchema
from deal_core.evaluation.likelihood import MeasuredAnswers
from deal_core.selection import score_class
from deal_core.selection.score import Candidates, RowScore

LABELLED = TaskSchema(name="shapes", labels=("round", "flat"), instruction="Which shape has it?", format="labelled")
FREE = TaskSchema(name="texts", instruction="Go on.", format="completion")
NUM_ROWS = 12


def check_score(name: str) -> None:
    """Score a few rows of a task with labels and of one with texts, and check what the score promises.

    Raises:
        ConfigError: There is no such score, or its class does not fit the name.
        AssertionError: A promise is broken. The message says which.
    """
    cls = score_class(name)
    for task in (LABELLED, FREE):
        found = _score(cls, task)
        assert found.shape == (NUM_ROWS,), f"{task.name}: the shape is {tuple(found.shape)}; give a number per row."
        assert bool(found.isfinite().all()), f"{task.name}: a number is not finite."
        before = torch.get_rng_state()
        again = _score(cls, task)
        assert torch.equal(found, again), f"{task.name}: the same rows and the same seed gave other numbers."
        assert torch.equal(before, torch.get_rng_state()), (
            f"{task.name}: the global generator was used; make one from Candidates.seed."
        )


def _score(cls: type[RowScore], task: TaskSchema) -> Tensor:
    rows, answers = range(NUM_ROWS), task.labels or ("one more word", "no")
    data = Dataset.from_list([{"input": f"thing number {row}", "output": answers[row % 2]} for row in rows])
    measured = None
    if cls.reads_model:
        generator = torch.Generator().manual_seed(0)
        num_tokens_N = torch.tensor([2.0 + row % 3 for row in rows], dtype=torch.float64)
        measured = MeasuredAnswers(
            loss_N=3 * torch.rand(len(rows), generator=generator, dtype=torch.float64),
            num_tokens_N=num_tokens_N,
            gradient_N=num_tokens_N.double().sqrt(),
            num_hits_N=(num_tokens_N - torch.tensor([row % 2 for row in rows])).double(),
        )
    return cls().score(Candidates(rows=data, task=task, measured=measured, seed=3))
