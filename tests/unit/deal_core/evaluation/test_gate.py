"""The gate decides only by its thresholds, and reports all reasons."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deal_core.evaluation.accuracy_matrix import AccuracyMatrix
from deal_core.evaluation.gate import decide
from deal_core.evaluation.report import AdapterFacts, Debt, EvaluationReport, GeneralScores
from deal_core.evaluation.significance import PairedDrop
from deal_core.judging_config import GateConfig


def make_report(
    accuracies: dict[str, float], parents: dict[str, float], *, task: str = "new", base: float = 0.2
) -> EvaluationReport:
    matrix = AccuracyMatrix()
    known: dict[str, float] = {}
    for name in [name for name in accuracies if name != task] + [task]:
        known[name] = accuracies[name]
        matrix = matrix.with_row(name, known, base_accuracy=base, parent_accuracy=None)
    return EvaluationReport(
        task=task,
        accuracies=accuracies,
        parent_accuracies=parents,
        base_accuracy=base,
        parent_accuracy_new_task=parents.get(task),
        num_rows=dict.fromkeys(accuracies, 100),
        matrix=matrix,
        notes=("the adapter is full",),
    )


GOOD = make_report({"old": 0.75, "new": 0.5}, {"old": 0.8})


def test_every_reason_is_told_with_task_value_and_limit() -> None:
    report = make_report({"old": 0.5, "older": 0.3, "new": 0.25}, {"old": 0.8, "older": 0.6})
    decision = decide(report, GateConfig(min_accuracy=0.4, max_mean_drop_points=None))
    assert not decision.accepted and len(decision.reasons) == 4
    found = [(check.kind, check.task, check.value, check.limit) for check in decision.failed_checks]
    assert found == [
        ("floor", "new", pytest.approx(25), pytest.approx(30)),
        ("floor", "new", pytest.approx(25), pytest.approx(40)),
        ("drop", "old", pytest.approx(30), 10),
        ("drop", "older", pytest.approx(30), 10),
    ]


@pytest.mark.parametrize(
    ("config", "accepted"),
    [
        (GateConfig(min_gain_points=30), True),
        (GateConfig(min_gain_points=30.1), False),
        (GateConfig(min_accuracy=0.5), True),
        (GateConfig(min_accuracy=0.51), False),
        (GateConfig(max_drop_points=5), True),
        (GateConfig(max_drop_points=4.9), False),
    ],
)
def test_each_threshold_decides_and_its_limit_itself_passes(config: GateConfig, accepted: bool) -> None:
    assert decide(GOOD, config).accepted is accepted


@pytest.mark.parametrize("hits", range(10, 101))
def test_a_gain_or_a_drop_of_exactly_the_limit_passes_whatever_the_rounding(hits: int) -> None:
    before = (hits - 10) / 100
    assert decide(make_report({"new": hits / 100}, {}, base=before), GateConfig(min_gain_points=10)).accepted
    fallen = make_report({"old": before, "new": 0.9}, {"old": hits / 100})
    assert decide(fallen, GateConfig(max_drop_points=10)).accepted


@pytest.mark.parametrize(("accuracy", "accepted"), [(0.96, True), (0.95, False)])
def test_a_task_that_is_nearly_all_right_before_can_still_pass(accuracy: float, accepted: bool) -> None:
    report = replace(make_report({"new": accuracy}, {}, base=0.5), majority_rate=0.92)
    decision = decide(report, GateConfig(min_gain_points=10))
    assert decision.accepted is accepted
    assert [check.limit for check in decision.failed_checks] == [pytest.approx(96)] * (not accepted), "half of 8 points"


def test_a_task_that_arrives_again_may_not_fall_below_its_parent_either() -> None:
    again = make_report({"old": 0.8, "new": 0.6}, {"old": 0.8, "new": 0.75})
    gain, drop = decide(again, GateConfig(max_mean_drop_points=None)).failed_checks
    assert (gain.kind, gain.task, drop.kind, drop.task) == ("gain", "new", "drop", "new")
    assert (round(drop.value or 0, 6), drop.limit) == (15.0, 10.0)


def test_earlier_test_rows_of_a_task_have_a_limit_of_their_own() -> None:
    report = make_report({"old": 0.8, "old.old-1": 0.3, "new": 0.5}, {"old": 0.8, "old.old-1": 0.8})
    report = replace(report, slices={"old.old-1": "old"})
    assert decide(report, GateConfig()).accepted, "the task itself has lost nothing"
    (check,) = decide(report, GateConfig(max_old_slice_drop_points=40)).failed_checks
    assert (check.kind, check.task, check.limit) == ("drop", "old.old-1", 40)
    assert decide(report, GateConfig(max_old_slice_drop_points=50)).accepted


def test_a_gain_on_an_old_task_is_no_drop() -> None:
    assert decide(make_report({"old": 0.9, "new": 0.6}, {"old": 0.1}), GateConfig(max_drop_points=0)).accepted


def test_a_report_without_an_old_tasks_accuracy_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no accuracy of \['lost'\]"):
        replace(GOOD, parent_accuracies={"old": 0.8, "lost": 0.5})


def outcomes(num_rows: int, *, lost: int, gained: int) -> tuple[str, str]:
    """Outcomes of a parent and of its child that lost and gained the given numbers of rows."""
    kept = num_rows - lost - gained
    return "1" * (kept + lost) + "0" * gained, "1" * kept + "0" * lost + "1" * gained


def paired(num_rows: int = 100, *, lost: int = 0, gained: int = 0, task: str = "old") -> EvaluationReport:
    """A version that changed its answers to an old task's rows."""
    before, after = outcomes(num_rows, lost=lost, gained=gained)
    share = {task: after.count("1") / num_rows}
    report = make_report({**share, "new": 0.9}, {task: before.count("1") / num_rows})
    return replace(
        report, outcomes={task: after}, parent_outcomes={task: before}, num_rows={task: num_rows, "new": num_rows}
    )


def test_a_drop_that_noise_explains_is_told_and_the_same_drop_on_more_rows_fails_a_check() -> None:
    decision = decide(paired(20, lost=6, gained=3), GateConfig())
    assert decision.accepted
    assert any("within the noise of 20 test rows" in note and "15.0 points" in note for note in decision.notes)
    assert not decide(paired(20, lost=6, gained=3), GateConfig(confidence=0.5)).accepted, "less noise is believed"
    (check,) = decide(paired(400, lost=120, gained=60), GateConfig()).failed_checks
    assert (check.kind, check.task, round(check.value or 0, 6), check.limit) == ("drop", "old", 15.0, 10.0)


def test_too_few_rows_to_judge_are_said() -> None:
    (note,) = decide(paired(36), GateConfig(max_drop_points=5)).notes
    assert note.startswith("old: too few test rows") and "11.1 points" in note
    assert decide(paired(36), GateConfig(max_drop_points=5)).unsure == (note,)
    assert decide(paired(36), GateConfig(max_drop_points=15)).notes == ()


def test_answers_that_changed_both_ways_hide_a_drop_that_as_many_rows_could_show() -> None:
    assert decide(paired(100), GateConfig()).unsure == ()
    (unsure,) = decide(paired(100, lost=25, gained=25), GateConfig()).unsure
    assert unsure.startswith("old: too few test rows")


def test_a_parent_whose_answers_were_not_kept_is_judged_as_measured_and_it_is_said() -> None:
    report = make_report({"old": 0.6, "new": 0.9}, {"old": 0.8})
    decision = decide(report, GateConfig())
    assert [check.kind for check in decision.failed_checks] == ["drop"] and "were not kept" in decision.notes[0]


def test_many_small_drops_are_rejected_by_their_mean() -> None:
    names = [f"old{i}" for i in range(8)]
    before, after = outcomes(200, lost=16, gained=0)
    report = make_report({**dict.fromkeys(names, 0.92), "new": 0.9}, dict.fromkeys(names, 1.0))
    report = replace(report, outcomes=dict.fromkeys(names, after), parent_outcomes=dict.fromkeys(names, before))
    (check,) = decide(report, GateConfig()).failed_checks
    assert (check.kind, check.task, check.limit) == ("mean_drop", None, 5.0) and round(check.value or 0, 6) == 8.0
    assert decide(report, GateConfig(max_mean_drop_points=8)).accepted
    assert decide(report, GateConfig(max_mean_drop_points=None)).accepted


def test_a_mean_drop_that_noise_explains_passes() -> None:
    before, after = outcomes(20, lost=3, gained=1)
    names = ("old", "older")
    report = make_report({**dict.fromkeys(names, after.count("1") / 20), "new": 0.9}, dict.fromkeys(names, 0.95))
    report = replace(report, outcomes=dict.fromkeys(names, after), parent_outcomes=dict.fromkeys(names, before))
    assert decide(report, GateConfig()).accepted, "ten points, above the limit of five"
    assert not decide(report, GateConfig(confidence=0.5)).accepted


def test_a_version_below_the_champion_on_the_new_task_is_rejected_beyond_noise_only() -> None:
    def below(num_rows: int, *, lost: int, gained: int) -> EvaluationReport:
        before, after = outcomes(num_rows, lost=lost, gained=gained)
        report = make_report({"new": after.count("1") / num_rows}, {})
        return replace(
            report,
            parent_accuracy_new_task=before.count("1") / num_rows,
            outcomes={"new": after},
            parent_outcomes={"new": before},
        )

    assert [check.kind for check in decide(below(100, lost=20, gained=2), GateConfig()).failed_checks] == ["gain"]
    assert decide(below(100, lost=4, gained=3), GateConfig()).accepted
    assert decide(below(100, lost=20, gained=2), GateConfig(min_gain_over_champion_points=None)).accepted
    assert not decide(below(100, lost=0, gained=10), GateConfig(min_gain_over_champion_points=20)).accepted


@pytest.mark.parametrize(("perplexity", "accepted"), [(44.9, True), (45.1, False), (float("nan"), False), (None, True)])
def test_general_ability_is_held_against_the_base(perplexity: float | None, accepted: bool) -> None:
    report = replace(GOOD, perplexity=perplexity, base_perplexity=30.0)
    assert decide(report, GateConfig()).accepted is accepted
    assert decide(report, GateConfig(max_perplexity_ratio=None)).accepted


def with_suite(base: str, parent: str | None, now: str) -> EvaluationReport:
    """A version with a suite of general ability; 1 and 0 are its rows' scores."""
    scores = {name: None if row is None else tuple(map(float, row)) for name, row in (("base", base), ("now", now))}
    before = None if parent is None else tuple(map(float, parent))
    return replace(GOOD, general={"json": GeneralScores(**scores, parent=before)})


def test_a_suite_that_lost_too_much_against_base_model_or_champion_is_rejected() -> None:
    whole, part = "1" * 60, "1" * 45 + "0" * 15
    for report, whose in ((with_suite(whole, part, part), "base model"), (with_suite(part, whole, part), "champion")):
        (check,) = decide(report, GateConfig()).failed_checks
        assert (check.kind, check.task, check.value, check.limit) == ("general_ability", "json", 25.0, 10.0)
        assert whose in check.message
        assert decide(report, GateConfig(max_general_drop_points=25)).accepted
        assert decide(report, GateConfig(max_general_drop_points=None)).accepted
    assert len(decide(with_suite(whole, whole, part), GateConfig()).failed_checks) == 2
    assert [check.task for check in decide(with_suite(whole, None, part), GateConfig()).failed_checks] == ["json"]
    assert decide(with_suite(part, part, whole), GateConfig()).accepted, "a gain"


def test_a_suites_loss_that_noise_explains_is_told_and_passes() -> None:
    before, after = outcomes(60, lost=20, gained=13)
    decision = decide(with_suite(before, None, after), GateConfig())
    assert decision.accepted
    assert len([note for note in decision.notes if "json" in note]) == 2, "too few rows, and noise"
    assert decision.unsure == (), "it is no old task"
    silent = decide(with_suite(before, None, after), GateConfig(max_general_drop_points=None))
    assert not any("json" in note for note in silent.notes)


@pytest.mark.parametrize(
    ("facts", "word"),
    [
        (AdapterFacts(norm=None, parent_norm=1.0, is_changed=True), "not finite"),
        (AdapterFacts(norm=0.0, parent_norm=None, is_changed=True), "empty"),
        (AdapterFacts(norm=1.0, parent_norm=1.0, is_changed=False), "nothing was learned"),
        (AdapterFacts(norm=11.0, parent_norm=1.0, is_changed=True), "11.00 times"),
        (AdapterFacts(norm=0.09, parent_norm=1.0, is_changed=True), "0.09 times"),
        (AdapterFacts(norm=2.0, parent_norm=1.0, is_changed=True), ""),
    ],
)
def test_a_broken_adapter_is_rejected(facts: AdapterFacts, word: str) -> None:
    if facts.is_changed and facts.norm and facts.parent_norm:
        assert decide(replace(GOOD, adapter=facts), GateConfig(max_norm_ratio=20.0)).accepted
        assert not decide(replace(GOOD, adapter=facts), GateConfig(max_norm_ratio=1.5)).accepted
    decision = decide(replace(GOOD, adapter=facts), GateConfig())
    assert decision.accepted is (not word) and word in " ".join(decision.reasons)


def test_a_task_that_is_only_guessed_is_not_learned_however_little_the_base_knows() -> None:
    shuffled = replace(make_report({"new": 0.222}, {}, base=0.0), majority_rate=1 / 6)
    (check,) = decide(shuffled, GateConfig()).failed_checks
    assert check.kind == "floor" and "the commonest answer's 16.7 % + 10.0 points" in check.message
    assert decide(replace(shuffled, majority_rate=None), GateConfig()).accepted


BUDGET = GateConfig(max_total_drop_points=8)


def with_debt(
    points: float, paired: PairedDrop | None = None, now: float = 0.75, **changes: object
) -> EvaluationReport:
    """A version whose old task was at 80 % in the parent, is at `now`, and has lost so many points in all."""
    report = make_report({"old": now, "new": 0.5}, {"old": 0.8})
    return replace(report, debts={"old": Debt(since="1", points=points, paired=paired)}, **changes)  # type: ignore[arg-type]


def test_losses_that_pass_one_by_one_spend_the_budget_together() -> None:
    assert decide(with_debt(20), GateConfig()).accepted, "without a budget only neighbours are compared"
    assert decide(with_debt(8), BUDGET).accepted
    (check,) = decide(with_debt(8.1), BUDGET).failed_checks
    assert (check.kind, check.task, check.value, check.limit) == ("total_drop", "old", 8.1, 8)


@pytest.mark.parametrize(
    ("report", "accepted"),
    [
        (with_debt(10, PairedDrop.of_hits(20, 3, 1)), True),  # noise explains it
        (with_debt(10, PairedDrop.of_hits(200, 25, 5)), False),
        (with_debt(20, now=0.8), True),  # the version adds nothing to the debt
        (with_debt(20, now=0.79), False),
    ],
)
def test_a_budget_is_spent_by_losses_that_are_no_noise_and_of_the_version_itself(
    report: EvaluationReport, accepted: bool
) -> None:
    assert decide(report, BUDGET).accepted is accepted


def test_a_consolidation_has_no_task_of_its_own_to_be_judged_by() -> None:
    low = replace(make_report({"old": 0.8, "new": 0.25}, {"old": 0.8, "new": 0.3}), parent_accuracy_new_task=0.3)
    assert {check.kind for check in decide(low, GateConfig()).failed_checks} == {"floor", "gain"}
    assert decide(replace(low, is_consolidation=True), GateConfig()).accepted
    lost = replace(make_report({"old": 0.6, "new": 0.3}, {"old": 0.8, "new": 0.3}), is_consolidation=True)
    assert decide(lost, GateConfig()).failed_checks[0].kind == "drop", "against the champion it is judged as any"
