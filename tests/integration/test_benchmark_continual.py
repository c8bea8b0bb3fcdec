"""The continual benchmark on a folder of two small tasks and the tiny base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer import BadParameter

from benchmarks.continual import main, read_settings
from benchmarks.continual_table import write_summary

LABELS = {"colours": ("red", "green"), "sizes": ("large", "small")}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    tasks = {name: {"instruction": f"Which of the {name}?", "labels": labels} for name, labels in LABELS.items()}
    (folder / "tasks.json").write_text(json.dumps(tasks))
    for name, labels in LABELS.items():
        for part, num_rows in (("train", 16), ("test", 8)):
            rows = [{"text": f"{part} {i} of {labels[i % 2]}", "label": labels[i % 2]} for i in range(num_rows)]
            (folder / f"{name}.{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(base: Path, data: Path, out: Path, seed: int = 0, **changes: object) -> None:
    options = {
        "order": ["colours,sizes"], "seed": [seed], "strategy": None, "rows": 16, "test_from": 2, "test_to": 8,
        "rank": 4, "base": str(base), "train": '{"num_epochs": 2, "learning_rate": 0.02}', "method": "{}",
        "last_only": False, "out": out / "cells", "work": out / "work", **changes,
    }  # fmt: skip
    main(data=data, **options)


def cells(out: Path) -> dict[str, dict]:
    return {p.name: json.loads(p.read_text()) for p in (out / "cells").glob("*.json") if p.name != "summary.json"}


def test_cells_are_paired_kept_and_summed_up(tiny_base, data, tmp_path):
    run(tiny_base, data, tmp_path)
    found = cells(tmp_path)
    assert sorted(cell["settings"]["strategy"] for cell in found.values()) == ["deal", "seq_lora"]
    for cell in found.values():
        assert [list(scores) for scores in cell["correct"]] == [["colours"], ["colours", "sizes"]]
        assert all(len(bits) == 6 and set(bits) <= set("01") for scores in cell["correct"] for bits in scores.values())
    first = [cell["correct"][0] for cell in found.values()]
    assert first[0] == first[1]  # the first task is shared
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").glob("*-*.json")}
    run(tiny_base, data, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").glob("*-*.json")} == stamps
    summary = json.loads((tmp_path / "cells" / "summary.json").read_text())
    deal = next(row for row in summary if row["strategy"] == "deal")
    last = next(cell for cell in found.values() if cell["settings"]["strategy"] == "deal")["correct"][-1]
    assert deal["average_accuracy"] == pytest.approx(100 * sum(b.count("1") / 6 for b in last.values()) / 2)
    mean, low, high = deal["difference_points_ci95"]
    assert low <= mean <= high


def test_the_parent_of_a_cell_is_its_own(tiny_base, data, tmp_path):
    """Old tasks are rehearsed: by deal from their instructions, by replay from rows its own first task has kept."""
    run(tiny_base, data, tmp_path, strategy=["seq_lora", "deal", "replay"])
    notes = {cell["settings"]["strategy"]: cell["notes"][0] for cell in cells(tmp_path).values()}
    assert notes["seq_lora"] == []
    assert "rehearsed 16 questions about old tasks (1)" in notes["deal"][0]
    assert "rehearsed 1 questions about old tasks (1)" in notes["replay"][0]


@pytest.mark.parametrize("change", ["seed", "method", "data"])
def test_what_decides_a_cell_makes_another_cell(change, tiny_base, data, tmp_path):
    run(tiny_base, data, tmp_path, strategy=["deal"])
    if change == "data":
        with (data / "sizes.test.jsonl").open("a") as file:
            file.write(json.dumps({"text": "one more", "label": "small"}) + "\n")
    changes = {"seed": {"seed": 1}, "method": {"method": '{"deal": {"core": "frozen"}}'}, "data": {}}[change]
    run(tiny_base, data, tmp_path, strategy=["deal"], **changes)
    assert len(cells(tmp_path)) == 2


def test_figures_of_the_summary(tmp_path):
    """Two orders of the same tasks: a test row that stands in both is one unit of the interval."""
    for order in ("a,b", "b,a"):
        for strategy, bits in (("seq_lora", "1100"), ("deal", "1110")):
            names = order.split(",")
            settings = {
                "strategy": strategy, "order": order, "tasks": names, "seed": 0, "rows": 1, "test_rows": [0, 4],
                "last_only": False, "adapter": {}, "train": {}, "method": None, "base": "b", "data": order,
            }  # fmt: skip
            correct = [{names[0]: "1111"}, {names[0]: bits, names[1]: bits}]
            path = tmp_path / f"{strategy}-{order}.json"
            path.write_text(json.dumps({"settings": settings, "correct": correct}))
    write_summary(tmp_path)
    rows = {(row["strategy"], tuple(row["orders"])): row for row in json.loads((tmp_path / "summary.json").read_text())}
    both = rows["deal", ("a,b", "b,a")]
    assert (both["average_accuracy"], both["forgetting"], both["num_cells"]) == (75.0, 25.0, 2)
    assert rows["seq_lora", ("a,b",)]["forgetting"] == 50.0
    assert both["difference_points_ci95"][0] == 25.0
    assert both["difference_points_ci95"] == rows["deal", ("a,b",)]["difference_points_ci95"]


def test_the_table_names_what_departs_from_the_defaults(tiny_base, data, tmp_path):
    run(tiny_base, data, tmp_path)
    run(tiny_base, data, tmp_path, strategy=["deal"], method='{"rehearsal": {"texts": "none"}}')
    lines = (tmp_path / "cells" / "summary.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:5]] == ["deal", "deal (rehearsal.texts none)", "seq_lora"]


def test_a_strategy_is_paired_with_the_same_seeds_of_the_baseline(tiny_base, data, tmp_path):
    run(tiny_base, data, tmp_path, strategy=["deal", "seq_lora"])

    def difference() -> list[float]:
        rows = json.loads((tmp_path / "cells" / "summary.json").read_text())
        return next(row for row in rows if row["strategy"] == "deal")["difference_points_ci95"]

    before = difference()
    run(tiny_base, data, tmp_path, strategy=["seq_lora"], seed=1)
    assert difference() == before


def test_unknown_settings_are_refused():
    with pytest.raises(BadParameter, match=r"unknown key 'method.deal.cor' \(known: form, core"):
        read_settings("{}", '{"deal": {"cor": 1}}')
    with pytest.raises(BadParameter, match=r"unknown key 'train.speed' \(known: learning_rate"):
        read_settings('{"speed": 1}', "{}")
    with pytest.raises(BadParameter, match=r"deal.tolerance is -1"):
        read_settings("{}", '{"deal": {"tolerance": -1}}')
    with pytest.raises(BadParameter, match="is not JSON"):
        read_settings("{}", "core=soft")
    with pytest.raises(BadParameter, match="is no JSON object"):
        read_settings("[1]", "{}")
