"""A cell on the tiny base: what it learns, what it scores, how it goes on after it died; and what is made of cells."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.report import best_rivals
from deal_core.adapter.state import adapter_on
from deal_core.benchmark.cell import SCHEMA_VERSION, Cell, make_cell, revision_of
from deal_core.benchmark.run import CellRun, run_cell
from deal_core.benchmark.suites import SuiteTask
from deal_core.benchmark.summary import departures, final_scores, matrix_of, protocols, read_cells, summarise
from deal_core.config import AdapterConfig, MethodConfig, TrainConfig
from deal_core.data.schema import TaskSchema
from deal_core.device import describe_machine
from deal_core.errors import DataValidationError
from deal_core.general_ability import LIMIT, TEXTS, perplexity
from deal_core.models import BaseModel
from deal_core.strategies.seq_lora import SeqLora

DEFAULTS = MethodConfig()
LABELS = {"colours": ("red", "green"), "sizes": ("large", "small"), "sounds": ("loud", "soft")}
TWO, THREE = tuple(LABELS)[:2], tuple(LABELS)
TRAIN = TrainConfig(batch_size=4, learning_rate=0.02, max_prompt_tokens=64, checkpoint_steps=0)


def task(name: str) -> SuiteTask:
    labels = LABELS[name]
    rows = [{"input": f"number {i} of {labels[i % 2]}", "output": labels[i % 2]} for i in range(25)]
    schema = TaskSchema(name=name, labels=labels, instruction=f"Which of the {name}?")
    return SuiteTask(schema=schema, train=tuple(rows[:16]), test=tuple(rows[16:]))


TASKS = {name: task(name) for name in LABELS}
Run = Callable[..., dict[str, Any]]


def cell(strategy: str, method: MethodConfig, tasks: tuple[str, ...] = TWO, **changes: Any) -> Cell:
    given = {
        "seed": 0, "rows": 16, "part": "reported", "max_test_rows": None, "scored": "all", "train": TRAIN,
        "adapter": AdapterConfig(rank=4), "base": "tiny", "data": "d", **changes,
    }  # fmt: skip
    return make_cell(strategy, tasks, method=method, **given)


@pytest.fixture
def run(base: BaseModel, tmp_path: Path) -> Run:
    """Run a cell and return what its file would hold."""

    def run(strategy: str, method: MethodConfig = DEFAULTS, on_progress: Any = None, **changes: Any) -> Any:
        made = cell(strategy, method, **changes)
        result = run_cell(
            CellRun(
                base=base, cell=made, tasks=TASKS, method=method, work=tmp_path / "work" / made.digest(),
                shared=tmp_path / "shared", on_progress=on_progress or (lambda *_: None),
            )
        )  # fmt: skip
        return json.loads(json.dumps({"settings": made.to_json(), **result}))

    return run


def scored(result: dict[str, Any]) -> list[list[str]]:
    return [list(version["scores"]) for version in result["versions"]]


def test_every_entry_that_the_matrix_needs_is_scored(run):
    names = list(THREE)
    assert scored(run("deal", tasks=THREE)) == [names[:2], names, names]
    assert scored(run("base", tasks=THREE)) == [sorted(names)]
    last = run("deal", scored="last", max_test_rows=2)
    assert scored(last) == [[], names[:2]]
    assert all(len(score["correct"]) == 2 for score in last["versions"][-1]["scores"].values())


def test_every_version_says_on_what_machine_it_was_made(run):
    versions = run("seq_lora")["versions"]
    assert [version["machine"] for version in versions] == [describe_machine()] * len(TWO)
    assert set(describe_machine()["versions"]) == {"torch", "transformers", "peft"}


def test_bounds_learn_every_task_alone_and_all_at_once_in_as_many_steps(run):
    """Six of nine test rows are reported; a model that has learned that a task has two answers is right on half."""
    learned = replace(TRAIN, num_epochs=12, learning_rate=0.01)
    each, joint = run("per_task", train=learned), run("joint", train=learned)
    assert scored(each) == [[name] for name in sorted(TWO)] and scored(joint) == [sorted(TWO)]
    assert [version["num_steps"] for version in each["versions"]] == [48, 48]
    assert [version["num_steps"] for version in joint["versions"]] == [96]
    assert [version["num_steps"] for version in run("joint", tasks=THREE)["versions"]] == [12]
    for score in final_scores(each).values():
        assert len(score["correct"]) == 6 and score["correct"].count("1") >= 3
        assert score["majority_rate"] == 0.5 and score["rouge1"] >= score["correct"].count("1") / 6
    assert sum(score["correct"].count("1") for score in final_scores(joint).values()) >= 3


def test_old_tasks_are_rehearsed_by_instruction_or_from_kept_rows(run):
    run("seq_lora")  # replay must not take its first version, which keeps no rows
    deal, replay = run("deal"), run("replay")
    assert "rehearsed 16 questions about old tasks (1)" in deal["versions"][1]["notes"][0]
    assert "rehearsed 1 questions about old tasks (1)" in replay["versions"][1]["notes"][0]
    assert (deal["stores"], deal["state_bytes"]) == ("nothing", 0)
    assert replay["stores"] == "data" and replay["state_bytes"] > 0
    assert len({version["adapter_bytes"] for version in deal["versions"]}) == 1
    grown = [version["adapter_bytes"] for version in run("inc_lora")["versions"]]
    assert grown[0] < grown[1]


def test_a_first_version_is_made_once_for_the_cells_that_share_it(run, tmp_path):
    first = run("seq_lora")["versions"][0]
    (file,) = (tmp_path / "shared").glob("*/version.json")
    file.write_text(json.dumps({**first, "mark": 1}))
    assert run("deal")["versions"][0] == {**first, "mark": 1}
    assert "mark" not in run("ewc")["versions"][0]


def test_a_cell_that_died_goes_on_with_the_task_it_was_at(run):
    seen: list[str] = []

    def die(done: float, total: float, doing: str) -> None:
        seen.append(doing)
        if doing == "sizes: step 3 of 4":
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run("o_lora", on_progress=die)
    num_before = len(seen)
    run("o_lora", on_progress=lambda _, __, doing: seen.append(doing))
    assert seen[num_before] == "sizes: step 1 of 4"


def test_perplexity_is_that_of_the_texts(base, parent):
    import torch

    with torch.no_grad():
        losses, num_tokens = 0.0, 0
        for text in TEXTS:
            ids = torch.tensor([base.tokenizer(text)["input_ids"]])
            losses += float(base.model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
            num_tokens += ids.shape[1] - 1
    before = perplexity(base.model, base.tokenizer)
    assert before == pytest.approx(float(torch.tensor(losses / num_tokens).exp()), rel=1e-4)
    with adapter_on(base.model, parent) as model:
        assert perplexity(model, base.tokenizer) != before
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.fill_(float("nan"))
        assert perplexity(model, base.tokenizer) == LIMIT, "the gate is told, and JSON can hold it"


def made(strategy: str, bits: list[dict[str, str]], **settings: Any) -> dict[str, Any]:
    """A cell as it would be stored, from the right and wrong rows of every version."""
    base = {
        "schema_version": SCHEMA_VERSION, "strategy": strategy, "tasks": ["yahoo", "agnews"], "seed": 0, "rows": 1,
        "part": "reported", "max_test_rows": None, "scored": "all", "adapter": {}, "train": {"seed": 0}, "method": {},
        "base": "b", "data": "d", "revision": revision_of(strategy),
    }  # fmt: skip
    versions = [
        {
            "task": name, "scores": {n: {"correct": b, "rouge1": 0.5, "majority_rate": 0.25} for n, b in each.items()},
            "rows_per_second": 2.0, "adapter_bytes": 10, "seconds": {"train": 60.0, "evaluate": 60.0},
        }
        for name, each in zip(base["tasks"], bits, strict=False)
    ]  # fmt: skip
    perplexities = {"base": 10.0, "adapted": 11.0}
    return {"settings": {**base, **settings}, "versions": versions, "perplexity": perplexities, "stores": "nothing"}


def rows_of(cells: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    (protocol,) = protocols(cells)
    return {(row["strategy"], " and ".join(row["orders"])): row for row in summarise(protocol)}


def test_figures_of_the_summary():
    """Two orders of the same tasks: a test row that stands in both is one unit of the interval."""
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
        line("joint", ["any"], 90), line("deal", ["1"], 80), line("ella", ["1"], 50), line("ella", ["3"], 70),
        line("ella", ["1", "3"], 60), line("seq_lora", ["1"], 65), line("replay", ["1"], 55),
        line("replay", ["1"], 75, "x 1"),
    ]  # fmt: skip
    assert best_rivals(rows) == ["replay (x 1)", "seq_lora", "ella"]


def test_a_difference_is_taken_on_the_same_orders_and_seeds_alone():
    bits = [{"yahoo": "11", "agnews": "10"}, {"yahoo": "11", "agnews": "11"}]
    both = [made("deal", bits), made("deal", bits, seed=1), made("seq_lora", bits)]
    assert rows_of(both)["seq_lora", "yahoo, agnews"]["difference_points_ci95"] == [0.0, 0.0, 0.0]
    lacking = [made("deal", bits), made("seq_lora", bits), made("seq_lora", bits, seed=1)]
    assert "difference_points_ci95" not in rows_of(lacking)["seq_lora", "yahoo, agnews"]


def test_a_difference_is_told_by_seed_and_without_the_task_that_it_owes_most_to():
    def ends(**last):
        return [{"yahoo": "1111"}, last]

    cells = [
        made("deal", ends(yahoo="1111", agnews="1000")), made("deal", ends(yahoo="1110", agnews="1000"), seed=1),
        made("seq_lora", ends(yahoo="0000", agnews="1100")),
        made("seq_lora", ends(yahoo="1110", agnews="1100"), seed=1),
    ]  # fmt: skip
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
    assert (row["average_accuracy"], row["average_accuracy_lifted"]) == pytest.approx((57.5, 90.0))
    assert rows_of(cells)["per_task", "any"]["average_accuracy"] == 60.0
    assert rows_of(cells[2:])["deal", "yahoo, agnews"]["average_accuracy_lifted"] is None


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


def test_departures_from_the_defaults_are_named():
    method = {"deal.energy": 0.5, "rehearsal.texts": "arrival"}
    assert departures(made("deal", [], method=method)) == "deal.energy 0.5"
    assert departures(made("joint", [])) == ""


def test_a_strategy_that_gives_other_results_than_before_has_cells_of_its_own(monkeypatch):
    def cell() -> Cell:
        return make_cell(
            "seq_lora", ("a", "b"), method=MethodConfig(), seed=0, train=TRAIN, rows=8, part="dev", max_test_rows=None,
            scored="all", adapter=AdapterConfig(), base="b", data="d",
        )  # fmt: skip

    before = cell().file_name
    monkeypatch.setattr(SeqLora, "revision", 2)
    assert cell().file_name != before and cell().to_json()["revision"] == 2
    assert departures({"settings": cell().to_json()}) == ""
    assert departures(made("seq_lora", [], revision=1)) == "revision 1"


def test_a_cell_of_another_schema_is_refused(tmp_path):
    (tmp_path / "deal-0-abc.json").write_text(json.dumps(made("deal", [], schema_version=1)))
    with pytest.raises(DataValidationError, match=r"deal-0-abc\.json has schema version 1"):
        read_cells(tmp_path)


def test_training_settings_and_rows_reach_the_cell(run):
    longer, shorter = run("seq_lora", train=replace(TRAIN, num_epochs=2)), run("seq_lora", rows=8)
    assert [version["num_steps"] for version in longer["versions"]] == [8, 8]
    assert [version["num_steps"] for version in shorter["versions"]] == [2, 2]
    assert shorter["perplexity"]["base"] != shorter["perplexity"]["adapted"]
