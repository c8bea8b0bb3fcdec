"""The form of feedback, and the spelling of its labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from deal_core.data.schema import TaskSchema
from deal_core.errors import ConfigError
from deal_core.monitoring.feedback import KEYS, Source, read_entry, select_rows
from tests.monitored import logged_rows

ID = "0123456789abcdef" * 2
TASKS = {"bank": TaskSchema(name="bank", labels=("Card lost", "b")), "talk": TaskSchema(name="talk", format="chat")}


def read(values: Any, source: Source = "command") -> Any:
    return read_entry(values, "Row 2", source=source, now=5.0)


def test_cells_of_a_csv_file_are_read_as_their_values() -> None:
    found = read({"id": f"cmpl-{ID}", "label": "", "is_right": "No", "is_random": "1", "reviewer": " Jo "}).feedback
    assert (found.id, found.label, found.is_right, found.is_random, found.reviewer) == (ID, None, False, True, "Jo")
    found = read({"id": ID, "label": "b", "is_right": float("nan"), "other": "x"}).feedback
    assert (found.label, found.is_right, found.is_random, found.reviewer) == ("b", None, False, None)


def test_a_label_gets_the_tasks_spelling_and_another_is_refused() -> None:
    entry = read({"id": ID, "label": "card  LOST"})
    for task in ("bank", None):
        assert entry.check_against(TASKS, task, "Row 2").label == "Card lost"
    with pytest.raises(ConfigError, match="Row 2 gives a label, and the task has none"):
        entry.check_against(TASKS, "talk", "Row 2")
    answer = read({"id": ID, "answer": "Hello"})
    for task in ("talk", None):
        assert answer.check_against(TASKS, task, "Row 2").label == "Hello"
    with pytest.raises(ConfigError, match="Row 2 gives an answer as free text"):
        answer.check_against(TASKS, "bank", "Row 2")
    for task in ("bank", None):
        with pytest.raises(ConfigError, match=r"does not have\. Its labels are: Card lost, b\."):
            read({"id": ID, "label": "c"}).check_against(TASKS, task, "Row 2")


@pytest.mark.parametrize(
    "values",
    [
        "x",
        {"label": "b"},
        {"id": ID},
        {"id": ID.upper(), "label": "b"},
        {"id": ID + "\n0", "label": "b"},
        {"id": ID, "label": 3},
        {"id": ID, "label": ["b"]},
        {"id": ID, "label": "b" * 100_001},
        {"id": ID, "label": "b", "answer": "b"},
        {"id": ID, "is_right": 2},
        {"id": ID, "is_right": True, "reviewer": {"a": 1}},
        {"id": ID, "is_right": True, "is_random": "perhaps"},
    ],
)
def test_another_form_is_refused(values: Any) -> None:
    with pytest.raises(ConfigError, match=r"^Row 2"):
        read(values)


def test_an_unknown_key_of_a_request_is_refused() -> None:
    with pytest.raises(ConfigError, match="lable; the keys are " + ", ".join(KEYS)):
        read({"id": ID, "label": "b", "lable": "b"}, "api")


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
