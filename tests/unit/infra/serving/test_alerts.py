"""The alert rules for Prometheus and the dashboard for Grafana name metrics that `deal serve` has."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import yaml

from infra.serving.server import Meter

ROOT = Path(__file__).parents[4]
RULES = ROOT / "infra" / "prometheus" / "deal-serve.yaml"
DASHBOARD = ROOT / "infra" / "grafana" / "deal-serve.json"


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


def require_names(expressions: Sequence[str]) -> set[str]:
    """The metrics of expressions, all of which the server has, with the labels that the expressions name."""
    told = metrics_and_labels()
    named = {name for expression in expressions for name in re.findall(r"\bdeal_\w+", expression)}
    assert named <= told.keys()
    for expression in expressions:
        for name, labels in re.findall(r"(deal_\w+)\{(.*?)\}", expression):
            assert set(re.findall(r"(\w+)[=!]", labels)) <= told[name]
    return named


def test_every_rule_names_metrics_and_labels_of_the_server() -> None:
    rules = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules) >= 4
    named = require_names([rule["expr"] for rule in rules])
    assert {"deal_serving_problem", "deal_requests_total", "deal_engine_up"} <= named


def test_every_panel_of_the_dashboard_names_metrics_and_labels_of_the_server() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    targets = [target for panel in panels for target in panel["targets"]]
    named = require_names([target["expr"] for target in targets])
    told = metrics_and_labels()
    shown = {name.removesuffix("_created") for name in told if not name.endswith("_created")}
    assert shown - named <= {"deal_request_seconds_count", "deal_request_seconds_sum"}, "the dashboard lacks a metric"
    labels = {"instance"} | set().union(*(told[name] for name in named))
    for target in targets:
        assert {*re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])} <= labels
        for grouped in re.findall(r"by \((.*?)\)", target["expr"]):
            assert {*grouped.split(", ")} <= labels
