"""Another base model on a real one: the built-in base model, and a merged export of it that was trained on other texts.

Nightly: five adaptations of the built-in base model.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.command import deal
from tests.e2e.test_gate_on_the_base_model import adapt

pytestmark = [pytest.mark.e2e, pytest.mark.base_model, pytest.mark.nightly(minutes=15)]

CLEARLY_LEARNED = 0.6
"""An accuracy that the base model, which names one of six topics by chance, does not have."""


def test_a_lineage_moves_to_a_model_that_was_trained_on_other_texts_and_back(tmp_path: Path) -> None:
    home, new = tmp_path / "home", str(tmp_path / "parcels-merged")
    for name in ("bank", "clinic"):
        assert adapt(home, name)["status"] == "promoted"
    assert adapt(home, "parcels", lineage="other")["status"] == "promoted"
    deal(home, "version", "export", "1", "--lineage", "other", "--format", "merged", "--out", new)

    words = ("lineage", "rebase", "demo", "--base", new)
    planned = deal(home, *words, "--dry-run")
    assert [*planned["branch"]["arrivals"].values()] == ["bank", "clinic"] and not planned["branch"]["lost"]
    result = deal(home, *words, "--yes")
    assert (result["status"], result["champion"]) == ("swapped", "4"), result
    assert min(result["before"].values()) > CLEARLY_LEARNED < min(result["accuracies"].values())
    print("before:", result["before"], "on the other base model:", result["accuracies"])

    message = ("I lost my card.", "--lineage", "demo", "--task", "bank")
    answer = deal(home, "predict", *message)
    assert (answer["version"], answer["base_model"]) == ("4", new)
    assert deal(home, "version", "rollback", "2", "--lineage", "demo")["champion"] == "2"
    back = deal(home, "predict", *message)
    assert back["version"] == "2" and back["base_model"] != new
