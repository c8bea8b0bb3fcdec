"""The figures of the benchmark's tables, computed from cells."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.headline import as_trained
from benchmarks.report import best_rivals, seconds_beside_steps, spread_of_seeds
from deal_core.benchmark.cell import SCHEMA_VERSION, Cell, make_cell, revision_of
from deal_core.benchmark.summary import (
    compared_with,
    departures,
    lost_since_learned,
    matrix_of,
    protocols,
    read_cells,
    summarise,
)
from deal_core.config import AdapterConfig, TrainConfig
from deal_core.errors import DataValidationError
from deal_core.method_config import MethodConfig
from deal_core.strategies.seq_lora import SeqLora


def made(strategy: str, bits: list[dict[str, str]], **settings: Any) -> dict[str, Any]:
    """A cell as it would be stored, from the right and wrong rows of every version."""
    base = {
        "schema_version": SCHEMA_VERSION,
        "strategy": strategy,
        "tasks": ["yahoo", "agnews"],
        "seed": 0,
        "rows": 1,
        "part": "reported",
        "max_test_rows": None,
        "scored": "all",
        "scoring": "generated",
        "prompt": "plain",
        "adapter": {},
        "train": {"seed": 0},
        "method": {},
        "base": "b",
        "data": "d",
        "revision": revision_of(strategy),
    }
    versions = [
        {
            "task": name,
            "scores": {n: {"correct": b, "rouge1": 0.5, "majority_rate": 0.25} for n, b in each.items()},
            "rows_per_second": 2.0,
            "adapter_bytes": 10,
            "seconds": {"train": 60.0, "evaluate": 60.0},
        }
        for name, each in zip(base["tasks"], bits, strict=False)
    ]
    perplexities = {"base": 10.0, "adapted": 11.0}
    return {"settings": {**base, **settings}, "versions": versions, "perplexity": perplexities, "stores": "nothing"}


def rows_of(cells: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    (protocol,) = protocols(cells)
    return {(row["strategy"], " and ".join(row["orders"])): row for row in summarise(protocol)}


def test_figures_of_the_summary():
    """Two orders of the same tasks: a test row in both orders is one unit of the interval."""
    cells = [made("base", [{"yahoo": "1000", "agnews": "0000"}], tasks=["agnews", "yahoo"])]
    for order in (["yahoo", "agnews"], ["agnews", "yahoo"]):
        for strategy, bits in (("seq_lora", "1100"), ("deal", "1110")):
            first, last = order
            cells.append(made(strategy, [{first: "1111", last: "1000"}, {first: bits, last: bits}], tasks=order))
    rows = rows_of(cells)
    deal, plain = rows["deal", "agnews, yahoo and yahoo, agnews"], rows["seq_lora", "yahoo, agnews"]
    assert (deal["average_accuracy"], deal["forgetting"], deal["backward_transfer"]) == (75.0, 25.0, -25.0)
    assert deal["num_cells"] == 2 and deal["rouge1"] == 50.0 and deal["perplexity_ratio"] == pytest.approx(1.1)
    assert plain["forgetting"] == 50.0 and plain["forward_transfer"] == 25.0  # 25 % before, 0 % untouched
    assert plain["difference_points_ci95"][0] == -25.0
    pooled = rows["seq_lora", "agnews, yahoo and yahoo, agnews"]
    assert pooled["difference_points_ci95"] == plain["difference_points_ci95"]
    assert "difference_points_ci95" not in deal


def test_a_bound_says_what_it_keeps():
    bits = [{"yahoo": "11"}, {"agnews": "11"}]
    cells = [made("per_task", bits), made("joint", [{"yahoo": "11", "agnews": "11"}])]
    for found in cells:
        for version in found["versions"]:
            version |= {"rows_per_second": 1.0, "adapter_bytes": 5}
    rows = rows_of(cells)
    alone, joint = rows["per_task", "any"], rows["joint", "any"]
    assert (alone["stores"], alone["adapter_bytes"]) == ("an adapter per task", [5, 10])
    assert (joint["stores"], joint["adapter_bytes"]) == ("all rows", [5, 5])


def test_the_best_rivals_are_told_by_all_their_orders_each_in_its_best_setting():
    def line(strategy, orders, average, changes=""):
        return {"strategy": strategy, "changes": changes, "orders": orders, "average_accuracy": average}

    rows = [
        line("joint", ["any"], 90),
        line("deal", ["1"], 80),
        line("ella", ["1"], 50),
        line("ella", ["3"], 70),
        line("ella", ["1", "3"], 60),
        line("seq_lora", ["1"], 65),
        line("replay", ["1"], 55),
        line("replay", ["1"], 75, "x 1"),
    ]
    assert best_rivals(rows) == ["replay (x 1)", "seq_lora", "ella"]


def test_a_difference_is_taken_on_the_same_orders_and_seeds_alone():
    bits = [{"yahoo": "11", "agnews": "10"}, {"yahoo": "11", "agnews": "11"}]
    both = [made("deal", bits), made("deal", bits, seed=1), made("seq_lora", bits)]
    assert rows_of(both)["seq_lora", "yahoo, agnews"]["difference_points_ci95"] == [0.0, 0.0, 0.0]
    wrong = [bits[0], {"yahoo": "00", "agnews": "00"}]
    partly = [made("deal", bits), made("seq_lora", bits), made("seq_lora", wrong, seed=1)]
    row = rows_of(partly)["seq_lora", "yahoo, agnews"]
    assert (row["difference_points_ci95"], row["difference_num_cells"], row["num_cells"]) == ([0.0, 0.0, 0.0], 1, 2)
    apart = [made("deal", bits), made("seq_lora", bits, seed=1)]
    assert "difference_points_ci95" not in rows_of(apart)["seq_lora", "yahoo, agnews"]


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


def test_tasks_count_alike_whatever_their_number_of_rows():
    ours = [{"yahoo": "1111"}, {"yahoo": "1111", "agnews": "1"}]
    plain = [{"yahoo": "1111"}, {"yahoo": "1111", "agnews": "0"}]
    row = rows_of([made("deal", ours), made("seq_lora", plain)])["seq_lora", "yahoo, agnews"]
    assert row["difference_points_ci95"][0] == -50.0 and row["average_accuracy"] == 50.0


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


def test_what_was_not_scored_is_no_figure():
    ends = made("deal", [{"yahoo": "11"}, {"yahoo": "10", "agnews": "11"}], scored="ends")
    row = rows_of([ends])["deal", "yahoo, agnews"]
    assert (row["forgetting"], row["forward_transfer"]) == (50.0, None)
    last = made("deal", [{}, {"yahoo": "10", "agnews": "11"}], scored="last")
    row = rows_of([last])["deal", "yahoo, agnews"]
    assert (row["average_accuracy"], row["forgetting"], matrix_of(last)) == (75.0, None, None)


def test_cells_of_another_protocol_stand_in_another_table():
    bits = [{"yahoo": "11", "agnews": "10"}, {"yahoo": "11", "agnews": "11"}]
    cells = [made("deal", bits), made("deal", bits, rows=2), made("seq_lora", bits, train={"seed": 3})]
    assert sorted(len(protocol.cells) for protocol in protocols(cells)) == [1, 2]
    cells = [made("deal", bits), made("deal", bits, prompt="chat")]
    assert [len(protocol.cells) for protocol in protocols(cells)] == [1, 1]


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
    assert departures(as_trained(recentred)) == ""


def test_one_training_that_was_scored_twice_counts_once_with_what_was_scored_most():
    bits = [{"yahoo": "11", "agnews": "10"}, {"yahoo": "10", "agnews": "11"}]
    cells = [made("deal", [{}, bits[1]], scored="last"), made("deal", bits), made("deal", bits, seed=1)]
    row = rows_of(cells)["deal", "yahoo, agnews"]
    assert (row["num_cells"], row["forgetting"]) == (2, 50.0)


def test_departures_from_the_defaults_are_named():
    method = {"deal.energy": 0.5, "rehearsal.rows": 0, "rehearsal.per_step": 4}
    assert departures(made("deal", [], method=method)) == "deal.energy 0.5, rehearsal.rows 0"
    assert departures(made("deal", [], method={"rehearsal.rows": 50})) == departures(made("joint", [])) == ""


def test_others_are_compared_with_todays_deal_or_else_with_that_of_an_earlier_default():
    earlier = ["memory none", "memory tests", "memory rows"]
    assert compared_with(["", *earlier]) == "" and compared_with(earlier) == "memory tests"
    assert compared_with(["memory rows", "memory none"]) == "memory none"
    assert compared_with(["deal.energy 0.5"]) == ""


def test_a_cell_of_a_strategy_that_is_not_installed_is_read_with_all_of_its_settings():
    cell = made("replay", [{"yahoo": "1"}, {"yahoo": "1", "agnews": "1"}], method={"rivals.strength": 4})
    cell["settings"] |= {"strategy": "gone", "revision": 3}
    assert departures(cell) == "rivals.strength 4"
    assert {name for name, _ in rows_of([cell])} == {"gone"}


def test_a_strategy_that_gives_other_results_than_before_has_cells_of_its_own(monkeypatch):
    def cell() -> Cell:
        return make_cell(
            "seq_lora",
            ("a", "b"),
            method=MethodConfig(),
            seed=0,
            train=TrainConfig(),
            rows=8,
            part="dev",
            max_test_rows=None,
            scored="all",
            adapter=AdapterConfig(),
            base="b",
            data="d",
        )

    before, shared_before = cell().file_name, cell().shared_digest()
    monkeypatch.setattr(SeqLora, "revision", 2)
    assert cell().file_name != before and cell().shared_digest() != shared_before
    assert cell().to_json()["revision"] == 2
    assert departures({"settings": cell().to_json()}) == ""
    assert departures(made("seq_lora", [], revision=1)) == departures(made("joint", [], revision=1)) == "revision 1"


def test_a_cell_of_another_schema_is_refused(tmp_path):
    (tmp_path / "deal-0-abc.json").write_text(json.dumps(made("deal", [], schema_version=1)))
    with pytest.raises(DataValidationError, match=r"deal-0-abc\.json has schema version 1"):
        read_cells(tmp_path)
