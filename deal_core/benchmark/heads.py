"""Bounds without training: a classifier per task on features of the untouched base model.

Nothing of the base model is trained, so nothing can be forgotten. A reviewer's question is what an adapter adds to it.
A classifier knows a row's task, as the prompt of every strategy does.

frozen_head: linear discriminant analysis with Ledoit-Wolf shrinkage, as RanPAC's head without its random projection
    (arXiv 2307.02251).
knn: the stored rows nearest to a text vote, after Reference Trustable Decoding (arXiv 2409.20181) with one head.
knn_means: the nearest mean of a label's rows.

Shapes: N rows, K neighbours, D width of the base model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.base import ClassifierMixin
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

NUM_NEIGHBOURS = 32


def _nearest_rows(train_ND: NDArray[np.float64]) -> ClassifierMixin:
    """Neighbours that vote with weight exp(-d^2 / T); T is the stored rows' mean d^2 to their own K-th neighbour."""
    num_neighbours = min(NUM_NEIGHBOURS, len(train_ND))
    scaled_ND = StandardScaler().fit_transform(train_ND)
    index = KNeighborsClassifier(num_neighbours).fit(scaled_ND, np.zeros(len(train_ND)))
    distances_NK, _ = index.kneighbors(scaled_ND)
    temperature = max(float(np.mean(distances_NK[:, -1] ** 2)), np.finfo(float).tiny)
    return KNeighborsClassifier(num_neighbours, weights=lambda distances: np.exp(-(distances**2) / temperature))


HEADS: dict[str, Callable[[NDArray[np.float64]], ClassifierMixin]] = {
    "frozen_head": lambda _: LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto"),
    "knn": _nearest_rows,
    "knn_means": lambda _: NearestCentroid(),
}
"""Name of a bound -> its classifier for these training rows. Features are standardised before it."""


def answer_by_head(
    bound: str, train_ND: Tensor, labels: Sequence[str], test_ND: Tensor, known: Sequence[str]
) -> list[str]:
    """Fit a bound's classifier on the training rows' features, and return its label for every test row.

    Args:
        bound: A name in HEADS.
        train_ND: Features of the training rows.
        labels: Their labels.
        test_ND: Features of the test rows.
        known: The task's labels; a label without a training row is never answered.
    """
    if len(set(labels)) < 2:  # a classifier needs two classes
        return [labels[0] if labels else known[0]] * len(test_ND)
    rows_ND = _array(train_ND)
    head = make_pipeline(StandardScaler(), HEADS[bound](rows_ND))
    head.fit(rows_ND, list(labels))
    return [str(label) for label in head.predict(_array(test_ND))]


def _array(values_ND: Tensor) -> NDArray[np.float64]:
    array: NDArray[np.float64] = values_ND.double().numpy()
    return array
