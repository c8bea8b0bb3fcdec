"""The gate on a real model: wrong labels and a training that wipes out an old task do not pass, a good arrival does.

Nightly: four adaptations of the built-in base model.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.command import deal

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
REJECTED = 3

pytestmark = [pytest.mark.e2e, pytest.mark.base_model, pytest.mark.nightly(minutes=10)]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def adapt(home: Path, name: str, *, expect: int = 0, data: Path | None = None, **changes: Any) -> Any:
    """Adapt to an example domain, with changes to its spec."""
    spec = yaml.safe_load((EXAMPLES / name / "spec.yaml").read_text())
    for key in ("data", "test_data"):
        if key in spec["task"]:
            spec["task"][key] = str(EXAMPLES / name / spec["task"][key])
    if data is not None:
        spec["task"]["data"] = str(data)
    for part, values in changes.items():
        spec[part] = {**spec.get(part, {}), **values} if isinstance(values, dict) else values
    path = home.parent / "spec.yaml"
    path.write_text(yaml.safe_dump(spec))
    return deal(home, "adapt", str(path), expect=expect)


def mislabelled(target: Path) -> Path:
    """The clinic's training notes, each finding replaced by the next one of the alphabet."""
    with (EXAMPLES / "clinic" / "train.csv").open(newline="") as file:
        header, *rows = list(csv.reader(file))
    column = header.index("finding")
    findings = sorted({row[column] for row in rows})
    following = dict(zip(findings, [*findings[1:], findings[0]], strict=True))
    for row in rows:
        row[column] = following[row[column]]
    with target.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return target


def champion(home: Path) -> str:
    """Version that answers now."""
    answer = deal(home, "predict", "I lost my card.", "--lineage", "demo", "--task", "bank")
    assert answer["answer"]
    return str(answer["version"])


def test_what_is_poisoned_or_forgets_is_rejected_and_what_is_good_passes(home: Path, tmp_path: Path) -> None:
    assert adapt(home, "bank")["status"] == "promoted" and champion(home) == "1"

    # The names of the findings alone lift the base model, which knows none, to a third: more than `min_gain_points`.
    gate = {"min_accuracy": 0.6}
    poisoned = adapt(home, "clinic", data=mislabelled(tmp_path / "poisoned.csv"), gate=gate, expect=REJECTED)
    assert poisoned["status"] == "rejected" and any(reason.startswith("clinic: ") for reason in poisoned["reasons"])
    assert champion(home) == "1"

    wiping = adapt(
        home, "parcels", strategy="seq_lora", train={"learning_rate": 5e-3, "max_steps": 80}, expect=REJECTED
    )
    assert any(reason.startswith("bank: accuracy fell by") for reason in wiping["reasons"]), wiping["reasons"]
    assert champion(home) == "1"

    good = adapt(home, "clinic", gate=gate)
    assert (good["status"], good["version"], good["parent_version"]) == ("promoted", "4", "1")
    assert champion(home) == "4"
    assert deal(home, "version", "rollback", "--lineage", "demo")["champion"] == "1" == champion(home)
