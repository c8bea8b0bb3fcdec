"""The figures of the benchmark's tables, computed from cells."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest

from benchmarks.continual.cell import SCHEMA_VERSION, revision_of
from benchmarks.continual.summary import departures, matrix_of, read_cells, summarise, tables
from deal_core.errors import DataValidationError
from deal_core.method_config import MethodConfig
from deal_core.strategies.seq_lora import SeqLora
from tests.unit.benchmarks.continual.test_cell import cell_of


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
    (table,) = tables(cells)
    return {(row["strategy"], " and ".join(row["orders"])): row for row in summarise(table)}


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


def test_tasks_count_alike_whatever_their_number_of_rows():
    ours = [{"yahoo": "1111"}, {"yahoo": "1111", "agnews": "1"}]
    plain = [{"yahoo": "1111"}, {"yahoo": "1111", "agnews": "0"}]
    row = rows_of([made("deal", ours), made("seq_lora", plain)])["seq_lora", "yahoo, agnews"]
    assert row["difference_points_ci95"][0] == -50.0 and row["average_accuracy"] == 50.0


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
    assert sorted(len(table.cells) for table in tables(cells)) == [1, 2]
    cells = [made("deal", bits), made("deal", bits, prompt="chat")]
    assert [len(table.cells) for table in tables(cells)] == [1, 1]


def test_one_training_that_was_scored_twice_counts_once_with_what_was_scored_most():
    bits = [{"yahoo": "11", "agnews": "10"}, {"yahoo": "10", "agnews": "11"}]
    cells = [made("deal", [{}, bits[1]], scored="last"), made("deal", bits), made("deal", bits, seed=1)]
    row = rows_of(cells)["deal", "yahoo, agnews"]
    assert (row["num_cells"], row["forgetting"]) == (2, 50.0)


def test_departures_from_the_defaults_are_named():
    method = {"deal.energy": 0.5, "rehearsal.rows": 0, "rehearsal.per_step": 4}
    assert departures(made("deal", [], method=method)) == "deal.energy 0.5, rehearsal.rows 0"
    assert departures(made("deal", [], method={"rehearsal.rows": 50})) == departures(made("joint", [])) == ""


def test_a_cell_of_a_strategy_that_is_not_installed_is_read_with_all_of_its_settings():
    cell = made("replay", [{"yahoo": "1"}, {"yahoo": "1", "agnews": "1"}], method={"rivals.strength": 4})
    cell["settings"] |= {"strategy": "gone", "revision": 3}
    assert departures(cell) == "rivals.strength 4"
    assert {name for name, _ in rows_of([cell])} == {"gone"}


def test_a_strategy_that_gives_other_results_than_before_has_cells_of_its_own(monkeypatch):
    cell = partial(cell_of, "seq_lora", MethodConfig())
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
