"""Choose the answered rows that are worth labelling: the least certain ones, and a share at random.

A row is uncertain if its answer has a small confidence. The log has the confidence of the given answer alone, so that
number takes the place of the margin between the two likeliest answers (uncertainty sampling by least confidence, Lewis
and Gale 1994, arXiv cmp-lg/9407020).
"""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np
import pandas as pd

from deal_core.errors import ConfigError

RANDOM_SHARE = 0.25
"""Share of the chosen rows that are drawn at random."""


def select_rows(
    rows: pd.DataFrame,
    number: int,
    *,
    random_share: float = RANDOM_SHARE,
    known: Collection[str] = frozenset(),
    seed: int = 0,
) -> pd.DataFrame:
    """Choose rows of one task. An input is chosen once, with its newest answer.

    The random rows are drawn first, from all rows that may be chosen. So they stand for all of them, and the accuracy
    on them is that of all. The other rows are the least certain ones of the rest. The result is shuffled: a person who
    stops in the middle has seen both kinds.

    Args:
        rows: Answered rows with the columns `time`, `input_sha256` and `confidence`; other columns are kept.
        number: Most rows of the result.
        random_share: Share of the result that is drawn at random, above 0; it is rounded up.
        known: Inputs that are never chosen, by `input_sha256`.
        seed: Of the draw and of the order. Neither depends on the order of `rows`.

    Returns:
        The chosen rows with the column `is_random`.

    Raises:
        ConfigError: `number` or `random_share` is not valid.
    """
    if number < 1:
        raise ConfigError(f"The number of rows to select is {number}; give at least 1.")
    if not 0 < random_share <= 1:
        raise ConfigError(f"The random share is {random_share}; give a number above 0 and at most 1.")
    newest = rows.sort_values("time", kind="stable").drop_duplicates("input_sha256", keep="last")
    pool = newest[~newest["input_sha256"].isin(known)].sort_values("input_sha256", ignore_index=True)
    number = min(number, len(pool))
    random = np.random.default_rng(seed)
    num_random = math.ceil(round(number * random_share, 9))
    drawn = random.choice(len(pool), num_random, replace=False) if num_random else np.zeros(0, dtype=np.int64)
    least_certain = pool.drop(drawn).sort_values("confidence", kind="stable").index[: number - num_random]
    chosen = random.permutation(np.concatenate([drawn, least_certain.to_numpy()]))
    return pool.assign(is_random=pool.index.isin(drawn)).loc[chosen].reset_index(drop=True)
