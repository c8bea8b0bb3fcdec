"""docs/operate.md shows alert rules for Prometheus. They name metrics that `deal serve` has."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import yaml

from infra.serving.server import Meter

PAGE = (Path(__file__).parents[4] / "docs" / "operate.md").read_text()


def shown_rules() -> list[dict[str, Any]]:
    """The rules of the page's block."""
    (block,) = [
        block for block in re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL) if "groups:" in block
    ]
    return [rule for group in yaml.safe_load(block)["groups"] for rule in group["rules"]]


def metrics_and_labels() -> dict[str, set[str]]:
    """What a server tells after one request: each sample's name and its labels."""
    engines = [{"url": "http://gpu-1:8000", "problem": None}]
    state = {"lineage": "support", "version": "3", "champion": "3", "problem": None, "engines": engines}
    meter = Meter(cast("Any", SimpleNamespace(state=lambda: state, log=None, rollout=None)))
    with meter.measured("/invocations") as labels:
        labels["status"] = "200"
    told: dict[str, set[str]] = {}
    for name, shown in re.findall(r"^(deal_\w+)(?:\{(.*)\})? ", bytes(meter.page().body).decode(), re.MULTILINE):
        told.setdefault(name, set()).update(re.findall(r'(\w+)="', shown))
    return told


def test_every_rule_names_metrics_and_labels_of_the_server() -> None:
    rules, told = shown_rules(), metrics_and_labels()
    assert len({rule["alert"] for rule in rules}) == len(rules) >= 4
    named = [name for rule in rules for name in re.findall(r"\bdeal_\w+", rule["expr"])]
    assert {"deal_serving_problem", "deal_requests_total", "deal_engine_up"} <= set(named) <= told.keys()
    for name, labels in (
        (name, labels) for rule in rules for name, labels in re.findall(r"(deal_\w+)\{(.*?)\}", rule["expr"])
    ):
        assert set(re.findall(r"(\w+)[=!]", labels)) <= told[name]
