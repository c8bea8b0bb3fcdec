"""The figures of stored cells on the tasks that measure something, and what pages say of them."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.tables import lost_since_learned, protocols, summarise
from tests.unit.benchmarks.continual.test_summary import made


def rows_of(cells: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    (protocol,) = protocols(cells)
    return {(row["strategy"], " and ".join(row["orders"])): row for row in summarise(protocol)}


def test_a_difference_is_told_by_seed_and_without_the_task_that_it_owes_most_to():
    def ends(**last):
        return [{"yahoo": "1111"}, last]

    cells = [
        made("deal", ends(yahoo="1111", agnews="1000")),
        made("deal", ends(yahoo="1110", agnews="1000"), seed=1),
        made("seq_lora", ends(yahoo="0000", agnews="1100")),
        made("seq_lora", ends(yahoo="1110", agnews="1100"), seed=1),
    ]
    row = rows_of(cells)["seq_lora", "yahoo, agnews"]
    assert list(row["difference_points_by_cell"].values()) == [-37.5, 12.5]
    assert row["difference_points_ci95"][0] == -12.5
    assert (row["heaviest_task"], row["difference_without_it_points_ci95"][0]) == ("yahoo", 25.0)


def test_a_task_that_no_adapter_lifts_stays_out_of_the_average_that_decides():
    tasks = ["agnews", "yahoo"]
    right, wrong = "1" * 90 + "0" * 10, "1" * 25 + "0" * 75
    cells = [
        made("base", [{"agnews": wrong, "yahoo": wrong}], tasks=tasks),
        made("per_task", [{"agnews": right}, {"yahoo": "1" * 30 + "0" * 70}], tasks=tasks),
        made("deal", [{"yahoo": wrong, "agnews": wrong}, {"yahoo": wrong, "agnews": right}]),
    ]
    (protocol,) = protocols(cells)
    assert protocol.lifted() == {"agnews": True, "yahoo": False}  # 30 of 100 is not above 25 % by 95 %
    row = rows_of(cells)["deal", "yahoo, agnews"]
    assert (row["average_accuracy"], row["average_accuracy_judged"]) == pytest.approx((57.5, 90.0))
    plain = made("seq_lora", [{"yahoo": wrong, "agnews": wrong}, {"yahoo": right, "agnews": wrong}])
    row = rows_of([*cells, plain])["seq_lora", "yahoo, agnews"]
    assert row["difference_points_ci95"][0] == pytest.approx(0.0)
    assert row["difference_judged_points_ci95"][0] == pytest.approx(-65.0)
    assert rows_of(cells)["per_task", "any"]["average_accuracy"] == 60.0
    assert rows_of(cells[2:])["deal", "yahoo, agnews"]["average_accuracy_judged"] is None


def test_what_is_lost_is_told_of_the_judged_tasks_but_the_newest():
    cell = made("deal", [{"yahoo": "1111"}, {"yahoo": "1000", "agnews": "1100"}])
    assert lost_since_learned(cell, ["yahoo", "agnews"]) == 75.0
    assert lost_since_learned(cell, ["agnews"]) is None, "nothing was learned after it"
    assert lost_since_learned({**cell, "settings": {**cell["settings"], "scored": "last"}}, ["yahoo"]) is None
