"""Drift: planted changes raise alarms, equal samples do not, and an alarm needs significance and size."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pandas as pd
import pytest

from deal_core.judging_config import DriftLimits
from deal_core.monitoring import two_samples
from deal_core.monitoring.drift import compare, estimated_accuracy, window
from deal_core.monitoring.report import LiveLook, TaskDrift
from deal_core.monitoring.two_samples import label_shares, pooled_counts
from tests.monitored import OTHER_WORDS, SHARES, WORDS, feedback_on, free_rows, logged_rows

REFERENCE = logged_rows(300, 0)
WITHOUT_SIZE = DriftLimits(alpha=0.05, min_psi=0.0, min_distance=0.0, min_auc=0.5, max_live_drop_points=0.0)
"""Every significant difference is an alarm."""


def look(
    live: pd.DataFrame, reference: pd.DataFrame = REFERENCE, config: DriftLimits | None = None, **more: Any
) -> TaskDrift:
    (found,) = compare(reference, live, config or DriftLimits(), **more).tasks
    return found


def kinds(found: TaskDrift) -> list[str]:
    return [alarm.kind for alarm in found.alarms]


@pytest.mark.parametrize("words", [None, WORDS])
@pytest.mark.parametrize("seed", range(5))
def test_identical_samples_never_alarm(seed: int, words: tuple[str, ...] | None) -> None:
    rows = logged_rows(250, seed, words=words)
    found = look(rows, rows, WITHOUT_SIZE)
    assert found.status == "compared" and len(found.tests) == (6 if words else 5)
    assert not found.alarms
    assert found.estimated is not None and found.estimated.drop_points == 0.0


@pytest.mark.nightly
def test_random_halves_alarm_no_oftener_than_promised() -> None:
    """The limits on the size are off here, so only the significance holds alarms back."""
    rows, random = logged_rows(400, 1), np.random.default_rng(0)
    num_looks, num_alarms = 400, 0
    for _ in range(num_looks):
        order = random.permutation(len(rows))
        num_alarms += bool(look(rows.iloc[order[:200]], rows.iloc[order[200:]], WITHOUT_SIZE).alarms)
    deviation = (num_looks * 0.05 * 0.95) ** 0.5
    assert num_alarms <= num_looks * 0.05 + 3 * deviation


@pytest.mark.nightly
def test_texts_of_one_kind_alarm_no_oftener_than_promised() -> None:
    alarms = [
        any(
            test.name == "texts" and test.is_alarm
            for test in look(
                logged_rows(120, seed, words=WORDS), logged_rows(120, 1000 + seed, words=WORDS), WITHOUT_SIZE
            ).tests
        )
        for seed in range(30)
    ]
    assert sum(alarms) <= 2


PLANTED = {
    "labels": {"shares": {"lost card": 0.1, "fee dispute": 0.2, "loan": 0.3, "fraud": 0.4}},
    "no label": {"shares": {**{label: 0.7 * share for label, share in SHARES.items()}, None: 0.3}},
    "confidence": {"sureness": (3.0, 3.0)},
    "label mass": {"label_mass": np.linspace(0.2, 0.9, 300)},
    "length of inputs": {"chars": np.arange(300)},
}


@pytest.mark.parametrize("name", PLANTED)
def test_each_planted_drift_alarms(name: str) -> None:
    found = look(logged_rows(300, 7, **PLANTED[name]))  # type: ignore[arg-type]
    assert name in [test.name for test in found.tests if test.is_alarm]
    assert "drift" in kinds(found) and any(alarm.reason.startswith(f"{name}:") for alarm in found.alarms)
    others = {test.name for test in found.tests if test.is_alarm} - {name}
    assert not others, "what did not change raises no alarm"


def test_a_label_that_is_gone_alarms_and_is_named() -> None:
    half = {"fee dispute": 0.5, "loan": 0.33, "fraud": 0.17}
    (alarm,) = look(logged_rows(300, 7, shares=half)).alarms
    assert alarm.kind == "drift" and "lost card" in alarm.reason and "→ 0 %" in alarm.reason


def test_longer_answers_of_a_free_task_alarm() -> None:
    reference = free_rows(200, 0)
    assert not look(free_rows(200, 1), reference).alarms
    found = look(free_rows(200, 1, answer_chars=60.0), reference)
    assert [test.name for test in found.tests if test.is_alarm] == ["length of answers"]
    assert found.estimated is None, "graded scores have no error rate"
    assert {test.name for test in found.tests} == {"confidence", "length of inputs", "length of answers"}


def test_other_texts_alarm_though_every_number_is_as_before() -> None:
    reference = logged_rows(200, 0, words=WORDS)
    found = look(logged_rows(200, 1, words=OTHER_WORDS), reference)
    (test,) = [test for test in found.tests if test.is_alarm]
    assert test.name == "texts" and test.effect > 0.95
    assert test.low is not None and test.high is not None and 0.9 < test.low <= test.effect <= test.high
    assert "texts" not in {test.name for test in look(logged_rows(200, 1), reference).tests}, "no texts are kept"
    same = logged_rows(200, 1, input="the same text of a health check, again and again")
    assert "texts" not in {test.name for test in look(same, reference).tests}, "one text is no sample of texts"


def test_an_alarm_needs_significance_and_size() -> None:
    many, small = logged_rows(20_000, 2, chars=100 + np.arange(20_000) % 40), DriftLimits(window_rows=20_000)
    shifted = many.assign(chars=many["chars"] + 3, id=many["id"] + "x")
    (lengths,) = [test for test in look(shifted, many, small).tests if test.name == "length of inputs"]
    assert lengths.p_value < 1e-20 and lengths.effect < 0.15 and not lengths.is_alarm
    few = DriftLimits(min_rows=5)
    for seed in range(20):
        found = look(logged_rows(12, 50 + seed), REFERENCE, few)
        assert not found.alarms, "twelve rows differ by much, and by chance"
    assert any(test.effect >= test.limit for test in found.tests)


@pytest.mark.parametrize("direction", [1, -1])
def test_a_change_of_precision_is_no_drift_and_a_small_change_of_every_answer_is(direction: int) -> None:
    sure = np.random.default_rng(0).uniform(0.85, 0.90, 300)  # a model that is sure of all its answers
    reference = logged_rows(300, 1, confidence=sure, label_mass=sure)
    for moved, names in ((0.01, set()), (0.06, {"confidence", "label mass"})):
        live = logged_rows(300, 2, confidence=sure + direction * moved, label_mass=sure + direction * moved)
        found = look(live, reference)
        assert {test.name for test in found.tests if test.is_alarm} == names


def test_too_few_rows_are_said_and_not_compared() -> None:
    live = logged_rows(99, 1, shares={"fraud": 1.0})
    found = look(live)
    assert (found.status, found.num_live, found.tests, found.alarms) == ("too few rows", 99, (), ())
    repeated = pd.concat([live, live.assign(id=live["id"] + "again", time=live["time"] + 1.0)])
    found = look(repeated)
    assert (found.status, found.num_live, found.num_logged) == ("too few rows", 99, 198), "repeats add no evidence"


def test_a_task_without_reference_is_said() -> None:
    report = compare(REFERENCE, logged_rows(200, 1, task="clinic"), DriftLimits())
    assert {each.task: each.status for each in report.tasks} == {"bank": "too few rows", "clinic": "no reference"}
    assert report.num_tests == 0


def test_the_window_has_the_newest_rows_and_counts_a_repeat_within_a_minute_once() -> None:
    rows = logged_rows(10, 1)
    assert [*window(rows.sample(frac=1, random_state=0), 3)["id"]] == [*rows["id"].tail(3)]
    later = rows.assign(time=rows["time"] + 600.0)
    assert len(window(pd.concat([rows, later]), 100)) == 20, "the same question an hour later is traffic"
    assert len(window(rows.assign(time=None, input_sha256="one"), 100)) == 10, "without times nothing is a repeat"


def test_tests_of_all_tasks_share_the_level() -> None:
    other = logged_rows(200, 3, task="clinic")
    one = compare(REFERENCE, logged_rows(200, 1), DriftLimits())
    two = compare(pd.concat([REFERENCE, other]), pd.concat([logged_rows(200, 1), other]), DriftLimits())
    assert (one.num_tests, two.num_tests) == (6, 12)
    assert one.level == pytest.approx(0.01 / 6) and two.level == pytest.approx(0.01 / 12)
    assert two.task("clinic").num_reference == 200, "each task has its own rows"


def test_many_tests_hide_no_alarm_whose_chance_comes_from_random_tables() -> None:
    """Three labels with few expected rows: the p-value of a total change is the smallest that random tables give."""
    before = logged_rows(300, 1, shares={"loan": 0.97, "fraud": 0.02, "fee": 0.01})
    after = logged_rows(120, 2, shares={"loan": 0.02, "fraud": 0.97, "fee": 0.01})
    found = look(after, before, DriftLimits(alpha=1e-6))
    (test,) = (each for each in found.tests if each.name == "labels")
    assert test.p_value <= two_samples.SMALLEST and test.is_alarm


def labels(**counts: int) -> pd.Series:
    return pd.Series([label for label, count in counts.items() for _ in range(count)])


def test_rare_labels_are_pooled() -> None:
    counts = pooled_counts(labels(a=50, b=45, c=3, d=2), labels(a=50, b=50, d=2, e=1))
    assert counts.tolist() == [[50, 45, 5], [50, 50, 3]], "c, d and e are rare on both sides together"
    assert pooled_counts(labels(a=9), labels(a=9)).shape[1] < 2


def test_a_rare_label_that_surges_is_seen() -> None:
    two = label_shares(labels(a=497, b=3), labels(a=80, b=20))
    assert two is not None and two.p_value < 1e-9 and two.effect > 0.2
    three = label_shares(labels(a=495, b=495, c=10), labels(a=35, b=35, c=30))
    assert three is not None and three.p_value < 1e-4 and three.effect > 0.2


@pytest.mark.nightly
def test_many_rare_labels_differ_significantly_no_oftener_than_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Expected counts are about 3 here, so the approximation does not hold."""
    monkeypatch.setattr(two_samples, "NUM_TABLES", 499)
    random, num_looks = np.random.default_rng(0), 300
    drawn = [pd.Series(random.integers(0, 60, 160)) for _ in range(2 * num_looks)]
    found = [label_shares(reference, live) for reference, live in zip(drawn[::2], drawn[1::2], strict=True)]
    num_significant = sum(each is not None and each.p_value < 0.05 for each in found)
    assert num_significant <= num_looks * 0.05 + 3 * (num_looks * 0.05 * 0.95) ** 0.5


def test_lower_confidence_lowers_the_estimated_accuracy() -> None:
    reference, live = logged_rows(2000, 0), logged_rows(2000, 1, sureness=(3.0, 3.0))
    found = look(live, reference, DriftLimits(window_rows=2000))
    assert found.estimated is not None and found.estimated.is_alarm and "quality" in kinds(found)
    same = estimated_accuracy(reference, logged_rows(2000, 2))
    assert same is not None and abs(same.accuracy - reference["score"].mean()) < 0.04
    assert same.low < same.accuracy < same.high


def test_the_estimate_is_the_share_of_live_rows_above_the_references_threshold() -> None:
    reference = logged_rows(10, 0, confidence=np.arange(1, 11) / 10, score=[0.0] * 3 + [1.0] * 7)
    live = logged_rows(8, 1, confidence=[0.05, 0.15, 0.39, 0.4, 0.41, 0.6, 0.9, 1.0])
    found = estimated_accuracy(reference, live)
    assert found is not None and found.accuracy == pytest.approx(5 / 8) and found.reference == 0.7
    assert found.drop_points == pytest.approx(7.5)


def test_an_estimate_needs_confidences_and_right_answers() -> None:
    assert look(logged_rows(200, 1, confidence=np.nan)).estimated is None
    assert look(logged_rows(200, 1), REFERENCE.assign(score=0.0)).estimated is None
    tied = estimated_accuracy(REFERENCE.assign(confidence=1.0), logged_rows(200, 1, confidence=1.0))
    assert tied is not None and tied.drop_points == 0.0
    assert tied.accuracy == pytest.approx(REFERENCE["score"].mean()), "ties do not move the estimate"


def test_feedback_on_rows_chosen_at_random_measures_the_accuracy() -> None:
    live = logged_rows(200, 1)
    bad = feedback_on(live, [True] * 40 + [False] * 60)
    found = look(live, feedback=bad)
    assert found.measured is not None and found.measured.num_rows == 100 and found.measured.accuracy == 0.4
    assert found.measured.low < 0.4 < found.measured.high < 0.51
    assert kinds(found) == ["quality"] and "measured at 40.0 %" in found.alarms[0].reason
    assert look(live, feedback=bad.assign(is_random=False)).measured is None, "people report errors"
    corrected = pd.concat([bad, feedback_on(live, [True] * 100, time=9.0)])
    assert not look(live, feedback=corrected).alarms, "the newest feedback on an answer counts"
    assert look(live, feedback=bad.assign(id="of another version")).measured is None


def test_decayed_means_worse_than_the_version_before_was() -> None:
    live = logged_rows(200, 1)
    bad = feedback_on(live, [True] * 45 + [False] * 55)
    assert kinds(look(live, feedback=bad, before={"bank": 0.7})) == ["quality", "decayed"]
    assert kinds(look(live, feedback=bad, before={"bank": 0.4})) == ["quality"]
    assert kinds(look(live, feedback=bad, before={"clinic": 0.7})) == ["quality"]
    good = feedback_on(live, [True] * 74 + [False] * 26)
    assert kinds(look(live, feedback=good, before={"bank": 0.95})) == [], "the gate accepted this accuracy"
    unsure = logged_rows(300, 1, sureness=(3.0, 3.0))
    assert "decayed" in kinds(look(unsure, before={"bank": 0.74}))
    well = feedback_on(unsure, [True] * 260 + [False] * 40)
    assert "decayed" not in kinds(look(unsure, before={"bank": 0.74}, feedback=well)), "feedback beats the estimate"


def test_a_baseline_takes_the_references_place_for_drift_and_not_for_accuracy() -> None:
    shifted = {"sureness": (3.0, 3.0), "shares": PLANTED["labels"]["shares"]}
    live = logged_rows(300, 1, **shifted)  # type: ignore[arg-type]
    assert {"drift", "quality"} <= set(kinds(look(live)))
    found = look(live, baseline=logged_rows(300, 2, **shifted))  # type: ignore[arg-type]
    assert set(kinds(found)) == {"quality"} and found.is_of_live_rows
    assert not look(live, baseline=logged_rows(300, 2, task="clinic")).is_of_live_rows


def test_a_report_is_read_back() -> None:
    report = compare(REFERENCE, logged_rows(300, 7, **PLANTED["no label"]), DriftLimits())  # type: ignore[arg-type]
    look_at = LiveLook(lineage="support", version="3", looked=datetime(2026, 5, 4, tzinfo=UTC), drift=report)
    assert LiveLook.from_json(json.loads(json.dumps(look_at.to_json(), allow_nan=False))) == look_at
    shares = report.task("bank").label_shares
    assert shares[""][0] == 0.0 and 0.2 < shares[""][1] < 0.4
    assert sum(now for _, now in shares.values()) == pytest.approx(1)
    assert sum(now for _, now in report.task("bank").confidences) == pytest.approx(1)
