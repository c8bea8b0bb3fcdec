"""prefect.yaml is checked strictly here, as Prefect ignores keys that it does not know and deploys regardless."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect import Flow
from prefect.client.schemas.objects import ConcurrencyLimitStrategy

from deal_pipeline.server.automations import RETURNING
from flows.sensor import ADAPT
from flows.watch import adapt_landed

FILE = Path(__file__).parents[3] / "prefect.yaml"
TOP = {"name", "prefect-version", "build", "push", "pull", "deployments", "definitions"}
DEPLOYMENT = {
    "name",
    "version",
    "tags",
    "description",
    "schedules",
    "paused",
    "concurrency_limit",
    "flow_name",
    "entrypoint",
    "parameters",
    "enforce_parameter_schema",
    "build",
    "push",
    "pull",
    "triggers",
    "work_pool",
}
WORK_POOL = {"name", "work_queue_name", "job_variables"}
CONCURRENCY = {"limit", "collision_strategy", "grace_period_seconds"}
TRIGGER = {
    "type",
    "name",
    "description",
    "enabled",
    "match",
    "match_related",
    "expect",
    "after",
    "for_each",
    "posture",
    "threshold",
    "within",
    "parameters",
    "job_variables",
}


def problems_of(content: dict[str, Any]) -> list[str]:
    """Everything in a prefect.yaml that Prefect would ignore, or take for something else than was meant."""
    found = unknown(content, TOP, "prefect.yaml")
    for deployment in content["deployments"]:
        place = f"deployment {deployment.get('name')}"
        found += unknown(deployment, DEPLOYMENT, place)
        found += unknown(deployment.get("work_pool", {}), WORK_POOL, f"{place}, work_pool")
        limit = deployment.get("concurrency_limit", {})
        found += unknown(limit, CONCURRENCY, f"{place}, concurrency_limit")
        if limit.get("collision_strategy", "ENQUEUE") not in {each.value for each in ConcurrencyLimitStrategy}:
            found.append(f"{place}: collision_strategy {limit['collision_strategy']}")
        if not deployment.get("name") or not deployment.get("work_pool", {}).get("name"):
            found.append(f"{place}: needs a name and a work pool")
        found += problems_of_entrypoint(deployment.get("entrypoint", ""), deployment.get("parameters", {}), place)
        for trigger in deployment.get("triggers", []):
            found += unknown(trigger, TRIGGER, f"{place}, trigger {trigger.get('name')}")
            if not trigger.get("match") or not trigger.get("expect"):  # an empty one matches every event there is
                found.append(f"{place}: trigger {trigger.get('name')} needs match and expect")
    return found


def problems_of_entrypoint(entrypoint: str, parameters: dict[str, Any], place: str) -> list[str]:
    if not re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", entrypoint):
        return [f"{place}: entrypoint {entrypoint!r} is not in the form module.flow"]
    module, _, name = entrypoint.rpartition(".")
    try:
        flow = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        return [f"{place}: entrypoint {entrypoint!r}: {error}"]
    if not isinstance(flow, Flow):
        return [f"{place}: entrypoint {entrypoint!r} is no flow"]
    return unknown(parameters, set(flow.parameters.properties), f"{place}, parameters")


def unknown(section: dict[str, Any], known: set[str], place: str) -> list[str]:
    return [f"{place}: unknown key {key!r}" for key in section if key not in known]


@pytest.fixture
def content() -> dict[str, Any]:
    """What prefect.yaml says."""
    return dict(yaml.safe_load(FILE.read_text(encoding="utf-8")))


def test_prefect_yaml_says_only_what_prefect_understands(content: dict[str, Any]) -> None:
    assert problems_of(content) == []
    for deployment in content["deployments"]:
        assert deployment["work_pool"]["name"] in ("deal-gpu", "deal-cpu")
        assert deployment["enforce_parameter_schema"] is True
        # without heartbeats a run whose machine is gone is never noticed
        assert deployment["work_pool"]["job_variables"]["env"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "30"
        assert "deal" in deployment["tags"], "deal status and the automations look for it"


def test_the_sensor_starts_the_deployment_that_learns(content: dict[str, Any]) -> None:
    (adapt,) = (
        deployment for deployment in content["deployments"] if deployment["entrypoint"].endswith("adapt_landed")
    )
    assert f"{adapt_landed.name}/{adapt['name']}" == ADAPT
    assert adapt["name"] not in RETURNING, "the sweep alone decides what became of its runs"
