"""Strategies of other packages: found by their entry points, checked by the conformance test, refused with a reason."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deal_core.errors import ConfigError
from deal_core.method_config import MethodConfig
from deal_core.strategies import OWN, PLUGINS, make_strategy
from deal_core.training.conformance import check_strategy
from tasks.lineage.choices import choose_strategy
from tasks.spec import AdaptSpec, parse
from tests.unit.deal_core.conftest import at_night

EXAMPLE = Path(__file__).parents[4] / "docs" / "own_strategy.py"
BROKEN = """
import random
import torch
from deal_core.adapter.files import MethodState
from deal_core.strategies.strategy import Strategy

class Idle(Strategy):
    name = "idle"
    def before_step(self):
        for parameter in self.parameters():
            parameter.grad = None

class Random(Strategy):
    name = "random"
    def after_step(self):
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(torch.tensor(random.SystemRandom().random()))

class Counts(Strategy):
    name = "counts"
    num_steps = 0
    def before_step(self):
        self.num_steps += 1
        for parameter in self.parameters():
            parameter.grad.mul_(1 / self.num_steps)

class Hoards(Strategy):
    name = "hoards"
    def finish(self):
        return MethodState(strategy=self.name, stores="nothing", tensors={"kept_rows.0": torch.ones(2)})

class Wishes(Strategy):
    name = "wishes"
    reads = ("deal.wish",)

class Other(Strategy):
    name = "another"
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package with the documented example and with strategies that break a promise each."""
    folder = tmp_path / "site"
    metadata = folder / "own_strategy-1.0.dist-info"
    metadata.mkdir(parents=True)
    shutil.copy(EXAMPLE, folder)
    (folder / "broken_strategies.py").write_text(BROKEN)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: own-strategy\nVersion: 1.0\n")
    names = {name.lower(): name for name in ("Idle", "Random", "Counts", "Hoards", "Wishes", "Other")}
    lines = [f"{name} = broken_strategies:{cls}" for name, cls in names.items()]
    lines += ["l2_sp = own_strategy:L2Sp", "gone = no_such_module:Gone", "deal = own_strategy:L2Sp"]
    (metadata / "entry_points.txt").write_text("\n".join(["[deal_pipeline.strategies]", *lines]))
    monkeypatch.syspath_prepend(folder)
    yield folder
    for name in ("own_strategy", "broken_strategies"):
        sys.modules.pop(name, None)


def test_the_documented_example_is_a_strategy(installed: Path, tmp_path: Path) -> None:
    check_strategy("l2_sp", tmp_path)
    values = {"task": {"name": "t", "data": "x.csv"}, "strategy": "l2_sp"}
    assert choose_strategy(parse(AdaptSpec, values, "test"), None) == "l2_sp"
    weighed = parse(AdaptSpec, {**values, "strategy_options": {"weight": 0.3}}, "test")
    assert make_strategy("l2_sp", weighed.method, 0).options.weight == 0.3
    for wrong, message in (
        ({"size": 1}, "'l2_sp' has no option 'size'; it takes weight"),
        ({"weight": -1}, "weight is -1"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse(AdaptSpec, {**values, "strategy_options": wrong}, "test")


@pytest.mark.parametrize("name", ["deal", "replay", *at_night("seq_lora")])
def test_our_own_keep_the_promises(name: str, tmp_path: Path) -> None:
    check_strategy(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "promise"),
    [
        ("idle", "changed nothing"),
        ("random", "the same seed gave another adapter"),
        ("counts", "a resumed run gave another adapter"),
        ("hoards", "the state holds rows"),
        ("wishes", "reads names no settings"),
    ],
)
def test_a_broken_promise_is_named(name: str, promise: str, installed: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=promise):
        check_strategy(name, tmp_path)


def test_a_class_that_cannot_be_used_is_refused_with_the_reason(installed: Path) -> None:
    with pytest.raises(ConfigError, match=r"'gone' \(no_such_module:Gone\) cannot be imported: ModuleNotFoundError"):
        make_strategy("gone", MethodConfig(), 0)
    with pytest.raises(ConfigError, match="no subclass of Strategy with the name 'other'"):
        make_strategy("other", MethodConfig(), 0)


def test_another_package_cannot_replace_ours(installed: Path) -> None:
    assert PLUGINS.find()["deal"].value == OWN["deal"]
    assert type(make_strategy("deal", MethodConfig(), 0)).__name__ == "Deal"


def test_the_forms_of_the_server_list_every_strategy(installed: Path) -> None:
    schema = AdaptSpec.model_json_schema()["properties"]["strategy"]
    assert {"deal", "l2_sp"} <= set(schema["anyOf"][0]["enum"])
