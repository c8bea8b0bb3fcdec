"""The bound `frozen_head`: a linear classifier per task on features of the untouched base model.

Nothing of the base model is trained, so nothing can be forgotten. A reviewer's question is what an adapter adds to it.
The classifier is a linear discriminant analysis with Ledoit-Wolf shrinkage, as RanPAC's head without its random
projection (arXiv 2307.02251). It knows a row's task, as the prompt of every strategy does.

Shapes: N rows, D width of the base model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor


def answer_by_head(
    train_ND: Tensor, labels: Sequence[str], test_ND: Tensor, known: Sequence[str]
) -> list[str]:
    """Fit the classifier on the training rows' features, and return its label for every test row.

    Args:
        train_ND: Features of the training rows.
        labels: Their labels.
        test_ND: Features of the test rows.
        known: The task's labels; a label without a training row is never answered.
    """
    if len(set(labels)) < 2:  # the analysis needs two classes
        return [labels[0] if labels else known[0]] * len(test_ND)
    head = make_pipeline(StandardScaler(), LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto"))
    head.fit(_array(train_ND), list(labels))
    return [str(label) for label in head.predict(_array(test_ND))]


def _array(values_ND: Tensor) -> NDArray[np.float64]:
    array: NDArray[np.float64] = values_ND.double().numpy()
    return array
