"""Which rows are chosen for labelling."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from deal_core.errors import ConfigError
from deal_core.monitoring.selection import select_rows
from tests.monitored import logged_rows

ROWS = logged_rows(200, seed=1)


@pytest.mark.parametrize("share", [0.25, 0.1, 1.0])
@pytest.mark.parametrize("number", [1, 3, 4, 30, 200, 999])
def test_the_random_share_is_honoured_and_the_rest_is_least_certain(number: int, share: float) -> None:
    found = select_rows(ROWS, number, random_share=share)
    size = min(number, len(ROWS))
    assert len(found) == size and found["is_random"].sum() == int(np.ceil(round(size * share, 9))) >= 1
    left = ROWS[~ROWS["id"].isin(found["id"])]
    assert not found["input_sha256"].duplicated().any()
    chosen = found.loc[~found["is_random"], "confidence"]
    assert chosen.empty or left.empty or chosen.max() <= left["confidence"].min()


def test_random_rows_stand_for_all_rows_the_least_certain_ones_too() -> None:
    """Were they drawn from what the least certain ones leave, the accuracy on them would be too high."""
    means, hit = [], set[str]()
    for seed in range(200):
        found = select_rows(ROWS, 80, seed=seed)
        drawn = found[found["is_random"]]
        means.append(drawn["confidence"].mean())
        hit |= set(drawn["id"])
    error = ROWS["confidence"].std() / np.sqrt(20 * 200)
    assert abs(np.mean(means) - ROWS["confidence"].mean()) < 4 * error
    assert hit == set(ROWS["id"])


def test_an_input_is_chosen_once_with_its_newest_answer_and_never_if_it_is_known() -> None:
    again = ROWS.assign(id="newest-" + ROWS["id"], time=ROWS["time"] + 1e6)
    known = set(ROWS.nsmallest(50, "confidence")["input_sha256"])
    found = select_rows(pd.concat([again, ROWS]), 999, known=known)
    assert len(found) == 150 and not set(found["input_sha256"]) & known
    assert found["id"].str.startswith("newest-").all()
    assert select_rows(ROWS, 5, known=set(ROWS["input_sha256"])).empty
    assert select_rows(ROWS.head(0), 5).empty


def test_the_seed_alone_decides_and_both_kinds_are_mixed() -> None:
    found = select_rows(ROWS, 40)
    at_once = ROWS.assign(time=0.0)
    shuffled = select_rows(at_once.sample(frac=1, random_state=7), 40)
    pd.testing.assert_frame_equal(select_rows(at_once, 40), shuffled)
    assert set(found["id"]) != set(select_rows(ROWS, 40, seed=1)["id"])
    places = np.flatnonzero(found["is_random"])
    assert places.min() < 10 and places.max() >= 30 and not found["confidence"].is_monotonic_increasing


@pytest.mark.parametrize(("number", "share"), [(0, 0.25), (-1, 0.25), (5, 0.0), (5, 1.1), (5, float("nan"))])
def test_a_share_that_draws_nothing_is_refused(number: int, share: float) -> None:
    with pytest.raises(ConfigError, match="; give "):
        select_rows(ROWS, number, random_share=share)
