"""The figures of stored cells on the tasks that measure something, and what pages say of them."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.report import seconds_beside_steps, spread_of_seeds
from benchmarks.tables import compared_with, lost_since_learned, protocols, summarise
from tests.unit.deal_core.benchmark.test_summary import made


def rows_of(cells: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    (protocol,) = protocols(cells)
    return {(row["strategy"], " and ".join(row["orders"])): row for row in summarise(protocol)}


def test_a_bound_that_the_product_had_is_told_apart_from_the_strategies():
    bits = [{"yahoo": "11"}, {"yahoo": "10", "agnews": "11"}]
    head = made("base", [{"yahoo": "11", "agnews": "10"}], tasks=["agnews", "yahoo"])
    head["settings"]["strategy"] = "frozen_head"
    rows = rows_of([made("deal", bits), head])
    assert rows["frozen_head", "any"]["stores"] == "a head per task"
    assert rows["frozen_head", "any"]["forgetting"] is None


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


def test_a_pair_from_two_kinds_of_processor_is_told():
    cells = [
        made("deal", [{"yahoo": "11"}, {"yahoo": "11", "agnews": "11"}]),
        made("seq_lora", [{"yahoo": "11"}, {"yahoo": "10", "agnews": "11"}]),
    ]
    assert rows_of(cells)["seq_lora", "yahoo, agnews"]["difference_is_of_one_processor"] is True
    cells[1]["perplexity"] = {"base": 10.1, "adapted": 11.0}
    assert rows_of(cells)["seq_lora", "yahoo, agnews"]["difference_is_of_one_processor"] is False


def test_seeds_that_round_alike_are_compared_by_method():
    last = {"yahoo": "11", "agnews": "11"}
    cells = [
        made("deal", [{"yahoo": "11"}, last]),
        made("deal", [{"yahoo": "11"}, {**last, "yahoo": "10"}], seed=1),
        made("deal", [{"yahoo": "11"}, {**last, "yahoo": "00"}], seed=2),
    ]
    cells[2]["perplexity"] = {"base": 10.1, "adapted": 11.0}
    assert spread_of_seeds(cells) == {"deal": 25.0}


def test_every_pass_over_a_row_is_a_part_of_the_steps():
    cell = made("deal", [{"yahoo": "11"}, {"yahoo": "11", "agnews": "11"}], rows=30, train={"seed": 0, "num_epochs": 3})
    assert seconds_beside_steps([cell]) == {"deal": (15.0, 15.0)}  # 60 s less 90 rows at 2 a second


def test_steps_that_recentre_are_a_part_of_the_method_so_both_stand_in_one_table():
    bits = [{"yahoo": "11"}, {"yahoo": "10", "agnews": "11"}]
    plain = made("deal", bits)
    recentred = made("deal", [bits[0], {"yahoo": "11", "agnews": "11"}], train={"seed": 0, "recentre_steps": 50})
    (protocol,) = protocols([plain, recentred])
    rows = {row["changes"]: row for row in summarise(protocol)}
    assert set(rows) == {"", "train.recentre_steps 50"}
    assert rows["train.recentre_steps 50"]["difference_points_ci95"][0] == 25.0


def test_others_are_compared_with_todays_deal_or_else_with_that_of_an_earlier_default():
    earlier = ["memory none", "memory tests", "memory rows"]
    assert compared_with(["", *earlier]) == "" and compared_with(earlier) == "memory tests"
    assert compared_with(["memory rows", "memory none"]) == "memory none"
    assert compared_with(["deal.energy 0.5"]) == ""
