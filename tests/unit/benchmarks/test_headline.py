"""The final table: which cells make a pair, what the rule says, and what the first line claims."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import headline
from benchmarks.continual.cell import Cell, pack_answers
from benchmarks.continual.summary import CellJson, matched
from benchmarks.headline import app, claim, difference_of, figures_of
from deal_core.method_config import MethodConfig
from tasks.references import BaseRef
from tests.unit.benchmarks.continual.test_summary import made

LABELS = ("up", "down")


@pytest.fixture(autouse=True)
def two_judged_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headline, "JUDGED", ("yahoo", "agnews"))


def answered(bits: str) -> dict[str, Any]:
    """Scores of a task whose right label is `up`: 1 for a row that was answered `up`, 0 for `down`."""
    log_probs_NL = torch.tensor([[0.8, 0.2] if bit == "1" else [0.2, 0.8] for bit in bits]).log()
    answers = ["up" if bit == "1" else "down" for bit in bits]
    score = {"correct": bits, "rouge1": 0.5, "majority_rate": 0.5}
    return score | pack_answers(answers, ["up"] * len(bits), LABELS, log_probs_NL)


def cell(strategy: str, learned: str, yahoo: str, agnews: str, *, seed: int = 4, base: float = 10.0) -> dict[str, Any]:
    """A cell that learned yahoo, then agnews: the outcomes of yahoo after it was learned, then those in the end."""
    is_bound = strategy == "joint"
    steps: list[dict[str, str]] = [{"yahoo": learned}, {"yahoo": yahoo, "agnews": agnews}]
    result = made(strategy, steps[1:] if is_bound else steps, seed=seed)
    for version, bits in zip(result["versions"], steps[is_bound:], strict=True):
        version["scores"] = {name: answered(each) for name, each in bits.items()}
        version["task"] = None if is_bound else version["task"]
    if is_bound:
        result["settings"]["tasks"] = ["agnews", "yahoo"]
    result["perplexity"] = {"base": base, "adapted": 12.0}
    return result


def pairs(*gains: int) -> list[tuple[CellJson, CellJson]]:
    """Pairs of other seeds: the first cell has so many more right rows of 10 in each task than the second."""
    right = [("1" * (5 + gain)).ljust(10, "0") for gain in gains]
    half = "1111100000"
    return [
        (cell("deal", each, each, each, seed=seed), cell("replay", half, half, half, seed=seed))
        for seed, each in enumerate(right)
    ]


def test_a_pair_has_one_seed_one_order_and_one_kind_of_processor() -> None:
    ours = [cell("deal", "11", "11", "11", seed=seed) for seed in (4, 5)]
    other_order = cell("replay", "11", "11", "11", seed=4)
    other_order["settings"]["tasks"] = ["agnews", "yahoo"]
    same, elsewhere = cell("replay", "10", "10", "10", seed=5), cell("replay", "10", "10", "10", seed=5, base=10.1)
    assert matched(ours, [other_order, elsewhere]) == []
    assert matched(ours, [same, other_order, elsewhere]) == [(ours[1], same)]
    together = cell("joint", "", "11", "11", seed=4)
    assert matched(ours, [together]) == [(ours[0], together)], "retraining has no order"


def test_the_figures_of_an_arm_are_of_what_was_learned_and_of_what_is_left() -> None:
    figures = figures_of("deal", [cell("deal", "1111", "1100", "1111")])
    assert (figures.learned, figures.end, figures.by_task) == (100.0, 75.0, {"yahoo": 50.0, "agnews": 100.0})
    assert figures.perplexity == pytest.approx(1.2)
    assert figures.nll == pytest.approx(
        -(6 * torch.tensor(0.8).log() + 2 * torch.tensor(0.2).log()).item() / 8, abs=1e-3
    )
    assert figures_of("retrain", [cell("joint", "", "1100", "1111")]).learned is None


@pytest.mark.parametrize(
    ("gains", "is_found"),
    [((2, 2, 3), True), ((-2, -2, -3), True), ((1, 1), False), ((1, -1, 1), False), ((0, 0, 0), False)],
)
def test_a_difference_is_found_by_the_rule(gains: tuple[int, ...], is_found: bool) -> None:
    ours, theirs = zip(*pairs(*gains), strict=True)
    difference = difference_of("replay", ours, theirs)
    assert difference is not None
    assert difference.mean == pytest.approx(10 * sum(gains) / len(gains))
    assert difference.is_found is is_found
    assert len(difference.pairs) == len(gains)


@pytest.mark.parametrize(
    ("gains", "says"),
    [
        ((2, 2, 3), "`deal` is better than replay (23.3 points, 9.0 to 37.7 over 3 pairs of runs)."),
        ((-2, -2, -3), "Replay is better than `deal` (23.3 points, 9.0 to 37.7 over 3 pairs of runs)."),
        (
            (1, -1, 1),
            "`deal` ended 3.3 points higher (-25.4 to 32.0 over 3 pairs of runs). The rule finds no difference.",
        ),
        ((1, 1), "so far there are 2 pairs."),
    ],
)
def test_the_claim_says_who_is_better_or_that_no_difference_was_found(gains: Sequence[int], says: str) -> None:
    ours, theirs = zip(*pairs(*gains), strict=True)
    full = "1" * 10
    line = claim({"deal": ours, "replay": theirs, "retrain": [cell("joint", "", full, full, seed=0)]})
    end = 50 + 10 * sum(gains) / len(gains)
    assert line.startswith(
        "`deal` is replay with a conservative update inspired by DEAL. "
        f"After 2 arrivals it ends at {end:.1f} % accuracy, replay of the same rows at 50.0 %, and retraining on "
        "all rows at 100.0 %. "
    )
    assert says in line and "\n" not in line


def test_a_page_needs_cells_of_every_arm_on_the_same_rows(tmp_path: Path) -> None:
    out = tmp_path / "page.md"
    missing = CliRunner().invoke(app, ["page", "--cells", str(tmp_path), "--out", str(out)])
    assert missing.exit_code == 2 and not out.exists()
    ours, theirs = pairs(1)[0]
    arms = {"deal": ours, "replay": theirs, "retrain": cell("joint", "", "1" * 10, "1" * 10, seed=0)}
    for name, each in arms.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "cell-0.json").write_text(json.dumps(each))
    done = CliRunner().invoke(app, ["page", "--cells", str(tmp_path), "--out", str(out)])
    assert done.exit_code == 0, done.output
    text = out.read_text()
    assert "| retrain | 1 | all rows | – | 100.0 | – |" in text and "| yahoo | 100.0 | 60.0 | 50.0 |" in text
    other = {**ours, "settings": {**ours["settings"], "data": "another cut of the tasks"}}
    (tmp_path / "deal" / "cell-1.json").write_text(json.dumps(other))
    mixed = CliRunner().invoke(app, ["page", "--cells", str(tmp_path), "--out", str(out)])
    assert mixed.exit_code == 2 and out.read_text() == text


def test_a_run_makes_cells_of_rows_that_chose_no_setting(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_cells: list[tuple[str, Cell]] = []

    def store(base: BaseRef, cell: Cell, method: MethodConfig, data: Path, out: Path, work: Path) -> str:
        assert out.is_dir()
        made_cells.append((out.name, cell))
        return "done"

    monkeypatch.setattr(headline, "identify_base", lambda source: BaseRef(source=source, name="tiny", sha256="0"))
    monkeypatch.setattr(headline, "order_of", lambda suite, order: ("dbpedia", "agnews")[:: 1 if order == "1" else -1])
    monkeypatch.setattr(headline, "make_cell_file", store)
    options = ["run", "--data", str(data), "--out", str(tmp_path / "final"), "--seed", "4", "--seed", "5"]
    done = CliRunner().invoke(app, [*options, "--arm", "deal", "--arm", "retrain", "--arm", "deal-keeps-nothing"])
    assert done.exit_code == 0, done.output
    assert {cell.part for _, cell in made_cells} == {"reported"}
    assert {(name, cell.seed, cell.tasks) for name, cell in made_cells if name == "deal"} == {
        ("deal", seed, tasks) for seed in (4, 5) for tasks in (("dbpedia", "agnews"), ("agnews", "dbpedia"))
    }
    kept = {name: cell.method.get("rehearsal.rows") for name, cell in made_cells}
    assert kept == {"deal": 50, "deal-keeps-nothing": 0, "retrain": None}
