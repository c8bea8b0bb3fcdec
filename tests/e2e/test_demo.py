"""The demo on the built-in base model.

Nightly: four adaptations.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.command import deal

pytestmark = [pytest.mark.e2e, pytest.mark.base_model]

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.nightly(minutes=4)
def test_the_first_domain_passes_the_gate(tmp_path: Path) -> None:
    home = tmp_path / "home"
    run = deal(home, "adapt", str(EXAMPLES / "bank" / "spec.yaml"))
    assert (run["status"], run["version"], run["num_steps"]) == ("promoted", "1", 39)
    assert run["accuracies"]["bank"] >= 0.3, "the base model has 0.06"
    answer = deal(home, "predict", "I lost my card on the train.", "--lineage", "demo")
    assert answer["version"] == "1" and answer["answer"]


@pytest.mark.nightly(minutes=10)
def test_three_domains_arrive_one_adapter_keeps_them_and_wrong_labels_are_held(tmp_path: Path) -> None:
    home = tmp_path / "home"
    (outcome,) = deal(home, "demo")["outcomes"]

    assert (outcome["lineage"], outcome["champion"]) == ("demo", "3")
    assert [(run["task"], run["status"]) for run in outcome["runs"]] == [
        ("bank", "promoted"),
        ("clinic", "promoted"),
        ("parcels", "promoted"),
        ("bank", "held"),
    ]
    assert [run["num_steps"] for run in outcome["runs"]] == [39, 39, 39, 0]
    held = outcome["runs"][-1]
    assert held["arrival"]["verdict"] == "labels disagree" and held["arrival"]["accuracy"] < 0.3
    assert [row["label"] != row["answer"] for row in held["contradictions"]] == [True] * 3
    matrix = outcome["matrix"]
    last = dict(zip(matrix["tasks"], matrix["rows"][-1], strict=True))
    for task, base in zip(matrix["tasks"], matrix["base"], strict=True):
        assert last[task] >= base + 0.1, f"{task} is not above the base model any more"

    answer = deal(home, "predict", "Mein Paket? My parcel is stuck at customs in Leipzig.", "--lineage", "demo")
    assert answer["version"] == "3" and answer["task"] == "parcels" and answer["answer"]
    scores = deal(home, "version", "evaluate", "--lineage", "demo")
    assert scores["accuracies"] == scores["recorded"] == pytest.approx(last)
    assert [entry["task"] for entry in deal(home, "version", "list", "--lineage", "demo")] == [
        "bank",
        "clinic",
        "parcels",
    ]
