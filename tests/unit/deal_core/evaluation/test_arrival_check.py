"""Wrong labels lower the score alone; new texts lower the confidence too."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deal_core.evaluation.arrival_check import (
    LEVEL,
    MIN_CALIBRATION,
    AnsweredRows,
    ArrivalScore,
    estimated_score,
    judge_arrival,
    surest_contradictions,
)

DROP = 15.0


def answered(num_sure: int, num_unsure: int) -> AnsweredRows:
    """Sure answers are right, unsure ones are wrong."""
    return AnsweredRows(scores=[1.0] * num_sure + [0.0] * num_unsure, confidences=[0.9] * num_sure + [0.4] * num_unsure)


def judge(arrival: AnsweredRows, tests: AnsweredRows, drop_points: float = DROP) -> ArrivalScore:
    return judge_arrival(arrival, reference=tests.scores, calibration=tests, drop_points=drop_points)


TESTS = answered(80, 20)
HALF_WRONG = AnsweredRows(scores=[1.0] * 24 + [0.0] * 36, confidences=answered(48, 12).confidences)
"""Rows as those of TESTS, of which half have another label."""


def test_labels_that_disagree_with_sure_answers_are_told_from_texts_that_are_new() -> None:
    assert judge(answered(48, 12), TESTS).verdict == "as expected"
    wrong, new = judge(HALF_WRONG, TESTS), judge(answered(24, 36), TESTS)
    assert (wrong.accuracy, new.accuracy) == (0.4, 0.4), "the scores are the same"
    assert (wrong.verdict, new.verdict) == ("labels disagree", "texts are new")
    assert (wrong.estimate, new.estimate) == pytest.approx((0.8, 0.4))
    assert (wrong.reference, wrong.num_reference, wrong.num_rows) == (0.8, 100, 60)
    assert wrong.p_value is not None and wrong.p_value < LEVEL and wrong.low < 0.4 < wrong.high


def test_a_third_of_the_fall_is_the_limit_of_what_confidence_has_to_explain() -> None:
    def arrival(num_unsure: int) -> AnsweredRows:
        """30 of 100 right: the score falls by 50 points, and the estimate by what is unsure beyond 20 rows."""
        return AnsweredRows(
            scores=[1.0] * 30 + [0.0] * 70, confidences=answered(100 - num_unsure, num_unsure).confidences
        )

    assert [judge(arrival(20 + points), TESTS).verdict for points in (0, 16, 17, 40)] == [
        "labels disagree",
        "labels disagree",
        "texts are new",
        "texts are new",
    ]


def test_a_fall_counts_only_if_it_is_large_and_no_chance() -> None:
    fallen = AnsweredRows(scores=[1.0] * 66 + [0.0] * 34, confidences=answered(80, 20).confidences)
    assert judge(fallen, TESTS).verdict == "as expected", "14 points"
    assert judge(fallen, TESTS, drop_points=10).verdict == "as expected", "p is 0.02"
    few = AnsweredRows(scores=[1.0, 0.0, 0.0], confidences=[0.9] * 3)
    assert judge(few, TESTS).verdict == "as expected", "a fall of 47 points of three rows"
    many = AnsweredRows(scores=fallen.scores * 10, confidences=fallen.confidences * 10)
    tests = AnsweredRows(scores=TESTS.scores * 10, confidences=TESTS.confidences * 10)
    assert judge(many, tests).verdict == "as expected" and judge(many, tests, drop_points=14).verdict != "as expected"


@pytest.mark.parametrize(
    "tests",
    [
        AnsweredRows(scores=TESTS.scores),
        AnsweredRows(scores=[0.9] * 50 + [0.7] * 50, confidences=TESTS.confidences),
        answered(MIN_CALIBRATION - 1, 0),
    ],
    ids=["no confidences", "graded", "too few"],
)
def test_without_an_estimate_nobody_can_tell_why_a_score_is_low(tests: AnsweredRows) -> None:
    judged = judge(HALF_WRONG, tests)
    assert (judged.verdict, judged.estimate) == ("lower", None)


def test_graded_scores_are_compared_by_permutation() -> None:
    generator = random.Random(0)

    def graded(mean: float, number: int) -> list[float]:
        return [min(1.0, max(0.0, generator.gauss(mean, 0.15))) for _ in range(number)]

    reference = graded(0.7, 100)
    low, same = (
        judge_arrival(
            AnsweredRows(scores=graded(mean, 60)),
            reference=reference,
            calibration=AnsweredRows(scores=reference),
            drop_points=DROP,
        )
        for mean in (0.4, 0.7)
    )
    assert (low.verdict, same.verdict) == ("lower", "as expected")
    assert low.p_value is not None and low.p_value < LEVEL


def test_without_a_reference_there_is_a_score_alone() -> None:
    judged = judge_arrival(HALF_WRONG, reference=[], calibration=AnsweredRows(scores=[]), drop_points=DROP)
    assert (judged.accuracy, judged.reference, judged.p_value, judged.verdict) == (0.4, None, None, "as expected")


HITS = st.lists(st.tuples(st.booleans(), st.floats(0, 1)), min_size=1, max_size=80)


def of(rows: Sequence[tuple[bool, float]]) -> AnsweredRows:
    return AnsweredRows(scores=[float(hit) for hit, _ in rows], confidences=[confidence for _, confidence in rows])


@given(arrival=HITS, tests=HITS, order=st.randoms(use_true_random=False))
def test_the_order_of_rows_and_labels_cannot_change_what_confidence_says(
    arrival: list[tuple[bool, float]], tests: list[tuple[bool, float]], order: random.Random
) -> None:
    whole = judge(of(arrival), of(tests))
    order.shuffle(arrival)
    assert judge(of(arrival), of(tests)) == whole
    other_labels = judge(of([(not hit, confidence) for hit, confidence in arrival]), of(tests))
    assert other_labels.estimate == whole.estimate, "the estimate sees no label"
    assert 0 <= whole.low <= whole.accuracy <= whole.high <= 1
    if whole.verdict != "as expected":
        assert whole.reference is not None and whole.p_value is not None
        assert whole.p_value < LEVEL and 100 * (whole.reference - whole.accuracy) >= DROP - 1e-6


@given(HITS)
def test_rows_that_are_the_test_rows_are_as_expected(tests: list[tuple[bool, float]]) -> None:
    judged = judge(of(tests), of(tests))
    assert judged.verdict == "as expected"
    estimate = estimated_score(of(tests), of(tests).confidences)
    if estimate is not None:
        assert estimate == pytest.approx(judged.accuracy), "of the rows that it was calibrated on it is the score"


def test_the_surest_contradictions_are_missed_rows_and_the_surest_comes_first() -> None:
    arrival = AnsweredRows(scores=[1, 0, 0, 0.5, 0], confidences=[0.99, 0.2, 0.9, 0.95, 0.5])
    assert surest_contradictions(arrival, 2) == [2, 4]
    assert surest_contradictions(AnsweredRows(scores=[0.0]), 2) == []
