"""Two samples of rows: how much they differ, and whether chance explains it.

Each function returns a `Difference`, or None if the samples cannot be compared. Every test is two-sided or, where only
one direction is bad, one-sided; the docstring says which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

MIN_COUNT = 5
"""Labels with fewer rows on both sides together are pooled."""
MIN_EXPECTED = 5.0
"""Smallest expected count of a cell for the χ² approximation (Cochran, 1954)."""
NUM_TABLES = 99_999
"""Random tables that stand for chance where the approximation does not hold."""
SMALLEST = 1 / (NUM_TABLES + 1)
"""The smallest p-value by random tables. It counts as significant at any level: many tests must not hide an alarm."""
NUM_FOLDS = 5
MIN_TEXTS = 5 * NUM_FOLDS
"""Fewest texts on each side that the classifier of texts can learn from."""
MAX_CHARS = 2000
"""Characters of a text that the classifier of texts reads."""
NUM_RESAMPLES = 1000
"""Bootstrap samples of the interval around an area under the ROC curve."""
INTERVAL = 0.95
"""Confidence of the intervals."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The difference of two samples."""

    effect: float
    """Its size; the function says in which unit."""
    p_value: float
    """Probability of at least this difference if both samples come from one distribution."""
    low: float | None = None
    """Lower end of the 95 % interval around the effect; None: not computed."""
    high: float | None = None


def label_shares(reference: pd.Series, live: pd.Series) -> Difference | None:
    """Compare the shares of labels. Effect: the population stability index (PSI). Test: χ² of homogeneity.

    PSI = Σ (p − q)·ln(p/q), with half a row added to each count. Labels with fewer than 5 rows on both sides together
    are pooled for both. If an expected count is below 5, the p-value is exact: Fisher's for two labels, else that of
    random tables with the same margins. None: fewer than two labels are left.
    """
    counts_2K = pooled_counts(reference, live)
    if counts_2K.shape[1] < 2:
        return None
    smooth_2K = counts_2K + 0.5
    p_K, q_K = smooth_2K / smooth_2K.sum(1, keepdims=True)
    psi = float(stats.entropy(p_K, q_K) + stats.entropy(q_K, p_K))
    return Difference(effect=psi, p_value=_homogeneity(counts_2K))


def pooled_counts(reference: pd.Series, live: pd.Series) -> Counts:
    """Count the labels of two samples, shape (2, K). Labels with fewer than 5 rows on both sides together are one cell.

    The sum of both sides decides. A rule about each side would keep the labels that differ by chance.
    """
    table = pd.DataFrame({"reference": reference.value_counts(), "live": live.value_counts()}).fillna(0)
    counts_2K: Counts = table.to_numpy(dtype=np.int64).T
    if counts_2K.shape[1] < 2 or not counts_2K.sum(1).all():
        return counts_2K[:, :0]
    rare_K = counts_2K.sum(0) < MIN_COUNT
    if not rare_K.any():
        return counts_2K
    return np.hstack([counts_2K[:, ~rare_K], counts_2K[:, rare_K].sum(1, keepdims=True)])


def _homogeneity(counts_2K: Counts) -> float:
    """Probability of at least this χ² if both rows come from one distribution."""
    if stats.contingency.expected_freq(counts_2K).min() >= MIN_EXPECTED:
        return float(stats.chi2_contingency(counts_2K, correction=False).pvalue)
    if counts_2K.shape[1] == 2:
        return float(stats.fisher_exact(counts_2K).pvalue)
    tables = stats.MonteCarloMethod(n_resamples=NUM_TABLES, batch=10_000, rng=np.random.default_rng(0))
    return float(stats.chi2_contingency(counts_2K, correction=False, method=tables).pvalue)


def distributions(reference: ArrayLike, live: ArrayLike, tolerance: float = 0.0) -> Difference:
    """Compare two samples of numbers. Effect: D, the largest distance of their distribution functions, 0 to 1.

    Test: Kolmogorov-Smirnov in both directions, with twice the smaller p-value. Ties make it conservative.

    Args:
        reference: Numbers of any count.
        live: Numbers to compare with them.
        tolerance: A difference of two numbers that means nothing. Live numbers are moved by it towards the reference
            before each direction is tested.
    """
    before, now = (np.asarray(numbers, dtype=np.float64) for numbers in (reference, live))
    lower = stats.ks_2samp(now + tolerance, before, alternative="greater")  # its distribution function lies above
    higher = stats.ks_2samp(now - tolerance, before, alternative="less")
    p_value = min(1.0, 2 * float(min(lower.pvalue, higher.pvalue)))
    return Difference(effect=float(max(lower.statistic, higher.statistic)), p_value=p_value)


def share_grew(num_reference: int, reference_rows: int, num_live: int, live_rows: int) -> Difference:
    """Compare two shares. Effect: live − reference. Test: Fisher's exact test that the live share is larger."""
    table = [[num_live, live_rows - num_live], [num_reference, reference_rows - num_reference]]
    p_value = float(stats.fisher_exact(table, alternative="greater").pvalue)
    return Difference(effect=num_live / live_rows - num_reference / reference_rows, p_value=p_value)


def texts(reference: Sequence[str], live: Sequence[str]) -> Difference | None:
    """Tell live texts from reference texts by a classifier (Lopez-Paz and Oquab, 2017).

    Effect: the area under the ROC curve (AUC) of its out-of-fold scores, 0.5 to 1, with a bootstrap interval. Test:
    Mann-Whitney on these scores, one-sided. The classifier is logistic regression on character n-grams, which needs no
    knowledge of the language. None: a side has fewer than 25 different texts.
    """
    sides = [list(dict.fromkeys(text[:MAX_CHARS] for text in side)) for side in (reference, live)]
    if min(map(len, sides)) < MIN_TEXTS:
        return None
    is_live = np.repeat([0, 1], [len(side) for side in sides])
    classifier = make_pipeline(
        TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True, max_features=50_000),
        LogisticRegression(class_weight="balanced", max_iter=1000),
    )
    folds = StratifiedKFold(NUM_FOLDS, shuffle=True, random_state=0)
    scores = cross_val_predict(classifier, [*sides[0], *sides[1]], is_live, cv=folds, method="predict_proba")[:, 1]
    from_live, from_reference = scores[is_live == 1], scores[is_live == 0]
    test = stats.mannwhitneyu(from_live, from_reference, alternative="greater", method="asymptotic")
    interval = stats.bootstrap(
        (from_live, from_reference),
        _auc,
        n_resamples=NUM_RESAMPLES,
        confidence_level=INTERVAL,
        method="percentile",
        vectorized=True,
        batch=100,
        rng=np.random.default_rng(0),
    ).confidence_interval
    auc = float(_auc(from_live, from_reference))
    return Difference(effect=auc, p_value=float(test.pvalue), low=float(interval.low), high=float(interval.high))


def _auc(first: Floats, second: Floats, axis: int = -1) -> Floats:
    """Probability that a value of the first sample is larger: Mann-Whitney's U / (n·m), along an axis."""
    pairs = first.shape[axis] * second.shape[axis]
    areas: Floats = stats.mannwhitneyu(first, second, axis=axis, method="asymptotic").statistic / pairs
    return areas
