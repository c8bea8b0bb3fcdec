"""Gate: whether a version may serve, decided from its evaluation alone."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from deal_core.config import GateConfig
from deal_core.evaluation.gate import GateDecision, decide
from deal_core.evaluation.report import EvaluationReport


@task(name="gate", cache_policy=NO_CACHE)
def decide_gate(report: EvaluationReport, config: GateConfig) -> GateDecision:
    """Judge a version. A rejection is a result, not an error."""
    return decide(report, config)
