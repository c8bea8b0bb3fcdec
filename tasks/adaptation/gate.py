"""The stage that decides whether a version may become champion. Its rules are in `deal_core.evaluation.gate`."""

from __future__ import annotations

from prefect import task

from deal_core.evaluation.gate import GateDecision, decide
from deal_core.evaluation.report import EvaluationReport
from tasks.adaptation.run import STAGE, AdaptationRun


@task(name="gate", **STAGE)
def judge_version(adaptation: AdaptationRun, report: EvaluationReport) -> GateDecision:
    """Accept or reject a version by the rules of `gate` in the spec."""
    return decide(report, adaptation.spec.gate)
