"""The gate accepts and refuses by its thresholds alone, and says all it found."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from deal_core.config import GateConfig
from deal_core.gate import EvaluationReport, decide
from deal_core.metrics import AccuracyMatrix


def make_report(
    accuracies: dict[str, float], parents: dict[str, float], *, task: str = "new", base: float = 0.2
) -> EvaluationReport:
    matrix = AccuracyMatrix()
    known: dict[str, float] = {}
    for name in [name for name in accuracies if name != task] + [task]:
        known[name] = accuracies[name]
        matrix = matrix.with_row(name, known, base_accuracy=base, parent_accuracy=None)
    return EvaluationReport(
        task=task, accuracies=accuracies, parent_accuracies=parents, base_accuracy=base, parent_accuracy_new_task=0.25,
        num_rows=dict.fromkeys(accuracies, 100), matrix=matrix, notes=("the adapter is full",),
    )


GOOD = make_report({"old": 0.75, "new": 0.6}, {"old": 0.8})


def test_a_version_within_every_limit_is_accepted() -> None:
    assert decide(GOOD, GateConfig()).accepted is True
    assert decide(GOOD, GateConfig()).reasons == ()


def test_a_first_version_has_no_parent_to_fall_below() -> None:
    assert decide(make_report({"new": 0.6}, {}), GateConfig()).accepted


def test_every_reason_is_told_with_task_value_and_limit() -> None:
    report = make_report({"old": 0.5, "older": 0.3, "new": 0.25}, {"old": 0.8, "older": 0.6})
    decision = decide(report, GateConfig(min_accuracy=0.4))
    assert not decision.accepted and len(decision.reasons) == 4
    gain, floor, old, older = decision.reasons
    assert gain.startswith("new: ") and all(text in gain for text in ("25.0 %", "30.0 %", "20.0 %", "10.0 points"))
    assert floor.startswith("new: ") and "25.0 %" in floor and "40.0 %" in floor
    assert old.startswith("old: ") and all(text in old for text in ("30.0 points", "80.0 %", "50.0 %", "10.0 points"))
    assert older.startswith("older: ")


@pytest.mark.parametrize(
    ("config", "accepted"),
    [
        (GateConfig(min_gain_points=40), True),
        (GateConfig(min_gain_points=40.1), False),
        (GateConfig(min_accuracy=0.6), True),
        (GateConfig(min_accuracy=0.61), False),
        (GateConfig(max_drop_points=5), True),
        (GateConfig(max_drop_points=4.9), False),
    ],
)
def test_each_threshold_decides_and_its_limit_itself_passes(config: GateConfig, accepted: bool) -> None:
    assert decide(GOOD, config).accepted is accepted


@pytest.mark.parametrize(("hits", "base_hits"), [(h, h - 10) for h in range(10, 101)])
def test_a_gain_of_exactly_the_limit_passes_whatever_the_rounding(hits: int, base_hits: int) -> None:
    report = make_report({"new": hits / 100}, {}, base=base_hits / 100)
    assert decide(report, GateConfig(min_gain_points=10)).accepted


@pytest.mark.parametrize("hits", range(10, 101))
def test_a_drop_of_exactly_the_limit_passes_whatever_the_rounding(hits: int) -> None:
    report = make_report({"old": (hits - 10) / 100, "new": 0.9}, {"old": hits / 100})
    assert decide(report, GateConfig(max_drop_points=10)).accepted


def test_a_task_that_arrives_again_may_not_fall_below_its_parent_either() -> None:
    again = make_report({"old": 0.8, "new": 0.6}, {"old": 0.8, "new": 0.75})
    (reason,) = decide(again, GateConfig()).reasons
    assert reason.startswith("new: ") and "15.0 points" in reason


def test_a_gain_on_an_old_task_is_no_drop() -> None:
    assert decide(make_report({"old": 0.9, "new": 0.6}, {"old": 0.1}), GateConfig(max_drop_points=0)).accepted


def test_report_survives_json() -> None:
    assert EvaluationReport.from_json(json.loads(json.dumps(GOOD.to_json()))) == GOOD
    with pytest.raises(ValueError, match="schema version 7"):
        EvaluationReport.from_json({**GOOD.to_json(), "schema_version": 7})


def test_a_report_without_an_old_tasks_accuracy_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no accuracy of \['lost'\]"):
        replace(GOOD, parent_accuracies={"old": 0.8, "lost": 0.5})
