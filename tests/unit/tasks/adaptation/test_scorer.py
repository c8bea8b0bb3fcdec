"""What is said of answers that one label has taken over."""

from __future__ import annotations

import pytest

from deal_core.evaluation.metrics import LabelFigures
from deal_core.evaluation.score import TaskEvaluation
from tasks.adaptation.scorer import Scored, collapse_notes


@pytest.mark.parametrize(("recentred", "is_gain"), [(0.5, False), (0.54, False), (0.75, True)])
def test_the_cost_is_named_if_it_is_a_row(recentred: float, is_gain: bool) -> None:
    """Of ten rows one is a tenth."""
    labels = (
        LabelFigures(label="closed", num_rows=5, recall=1.0, share=1.0),
        LabelFigures(label="open", num_rows=5, recall=0.0, share=0.0),
    )
    found = TaskEvaluation(
        task="tickets",
        accuracy=0.5,
        rouge1=0.5,
        num_rows=10,
        majority_rate=0.5,
        answers=("closed",) * 10,
        outcomes=(1.0,) * 5 + (0.0,) * 5,
        labels=labels,
    )
    (note,) = collapse_notes(Scored({"tickets": found}, {}, None, recentred={"tickets": recentred}))
    first = "tickets: 100 % of the answers are 'closed', but 50 % of the test rows are"
    often = "If every label were answered as often as it occurs, accuracy would be 75.0 % instead of 50.0 %"
    assert note == (f"{first}. {often}" if is_gain else first)
