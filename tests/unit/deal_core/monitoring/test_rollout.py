"""A rollout: a worse candidate is aborted, one that is not worse finishes, and looking often changes neither."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest

from deal_core.judging_config import RolloutKind, RolloutTerms
from deal_core.monitoring.predictions import ROLLOUT_COLUMNS
from deal_core.monitoring.rollout import Look, RolloutReport, judge, last_look
from tests.monitored import logged_rows

LABELS = ("lost card", "loan")


def terms(kind: RolloutKind, num_rows: int = 200) -> RolloutTerms:
    return RolloutTerms(kind, 0.5, num_rows, max_drop_points=10.0, confidence=0.95)


class Traffic:
    """Rows of a log in which the right label is always `lost card`, and feedback on the first rows."""

    def __init__(self, kind: RolloutKind, seed: int = 0) -> None:
        self.kind: RolloutKind = kind
        self.random = np.random.default_rng(seed)
        self.frames: list[pd.DataFrame] = []

    def add(self, version: str, right: Sequence[bool], *, shadow: bool = False, **columns: Any) -> pd.DataFrame:
        labels = [LABELS[0] if each else LABELS[1] for each in right]
        given = {"label": labels, "is_label": True, **columns}
        rows = logged_rows(len(labels), len(self.frames), version=version, **given)
        rows = rows.drop(columns="score").assign(**dict.fromkeys(ROLLOUT_COLUMNS))
        if shadow:
            rows["shadow_of"] = self.frames[0]["id"].iloc[: len(rows)].to_numpy()
        self.frames.append(rows.assign(**{name: columns[name] for name in ROLLOUT_COLUMNS if name in columns}))
        return self.frames[-1]

    def draw(self, number: int, accuracy: float) -> list[bool]:
        return [*(self.random.random(number) < accuracy)]

    def judged(self, rows: int = 200, said: pd.DataFrame | None = None) -> RolloutReport:
        given = feedback(self.frames[0].head(0)) if said is None else said
        return judge(pd.concat(self.frames), given, terms(self.kind, rows), champion="1", candidate="2")


def feedback(rows: pd.DataFrame, **columns: Any) -> pd.DataFrame:
    """What a user says about each row: the right label, and whether the answer was right."""
    return pd.DataFrame(
        {
            "id": rows["id"],
            "time": rows["time"],
            "label": LABELS[0],
            "is_right": rows["label"] == LABELS[0],
            "source": "api",
            "is_random": False,
            "reviewer": None,
            **columns,
        }
    )


def shadow(before: float, now: float, number: int = 400, seed: int = 0) -> tuple[Traffic, pd.DataFrame]:
    traffic = Traffic("shadow", seed)
    said = feedback(traffic.add("1", traffic.draw(number, before)))
    traffic.add("2", traffic.draw(number, now), shadow=True)
    return traffic, said


def canary(before: float, now: float, number: int = 400, seed: int = 0) -> tuple[Traffic, pd.DataFrame]:
    traffic = Traffic("canary", seed)
    said = [
        feedback(traffic.add(version, traffic.draw(number, accuracy)))
        for version, accuracy in (("1", before), ("2", now))
    ]
    return traffic, pd.concat(said)


@pytest.mark.parametrize("make", [shadow, canary])
def test_a_worse_candidate_is_aborted_and_a_better_one_finishes(make: Any) -> None:
    traffic, said = make(0.9, 0.5)
    worse = traffic.judged(said=said)
    assert worse.verdict == "abort" and worse.reasons[0].startswith("accuracy: -")
    assert (worse.num_counted, worse.by_feedback) == (400, True)
    accuracy = worse.differences[0]
    assert accuracy.high < 0 and accuracy.low < accuracy.points < accuracy.high
    assert accuracy.is_paired == (make is shadow)
    traffic, said = make(0.6, 0.9)
    better = traffic.judged(said=said)
    assert better.verdict == "finish" and better.reasons[0].startswith("accuracy: +")
    traffic, said = make(0.6, 0.9, 199)
    assert traffic.judged(said=said).verdict == "goes on", "one row is missing"


def test_a_loss_within_noise_is_allowed_up_to_the_limit() -> None:
    traffic, said = shadow(0.5, 0.5, 40)
    first = traffic.frames[0]["label"] == LABELS[0]
    traffic.frames[1]["label"] = [LABELS[0] if each else LABELS[1] for each in first]
    flipped = [*first[first].index[:5]]
    traffic.frames[1].loc[flipped[:4], "label"] = LABELS[1]
    assert traffic.judged(40, said).verdict == "finish", "10 points are lost, 10 are allowed"
    traffic.frames[1].loc[flipped, "label"] = LABELS[1]
    lost = traffic.judged(40, said)
    assert lost.verdict == "abort" and not lost.differences[0].is_worse
    assert lost.reasons == (lost.reasons[0],) and lost.reasons[0].endswith("a loss of 10 points is allowed")


@pytest.mark.nightly
@pytest.mark.parametrize("make", [shadow, canary])
def test_equal_versions_are_seldom_aborted_however_often_somebody_looks(make: Any) -> None:
    aborted = 0
    for seed in range(40):
        traffic, said = make(0.8, 0.8, 200, seed)
        looks = [said.groupby(said["id"].str.split("-").str[1]).head(number) for number in (25, 50, 100, 200)]
        aborted += any(any(each.is_worse for each in traffic.judged(said=look).differences) for look in looks)
    assert aborted <= 40 * 0.05 + 2


def test_looks_are_few_and_between_two_of_them_nothing_counts() -> None:
    assert [last_look(number, 200) for number in (24, 25, 99, 200, 399, 400)] == [
        None,
        Look(0, 25),
        Look(1, 50),
        Look(3, 200),
        Look(3, 200),
        Look(4, 400),
    ]
    assert last_look(30, 30) == Look(3, 30) and last_look(1, 1) == Look(3, 1)
    traffic, said = shadow(0.9, 0.9, 60)
    before = traffic.judged(said=said)
    traffic.frames[1].loc[50:, "label"] = LABELS[1]  # the newest ten are all wrong
    assert traffic.judged(said=said).differences == before.differences


def test_failures_and_answers_that_are_no_label_abort_without_any_feedback() -> None:
    kinds: tuple[RolloutKind, ...] = ("shadow", "canary")
    cases = (({"is_failed": True}, "answered"), ({"label": None, "is_label": False}, "answers that"))
    for kind in kinds:
        for columns, figure in cases:
            traffic = Traffic(kind)
            traffic.add("1", [True] * 200)
            traffic.add("2", [True] * 30, shadow=kind == "shadow", **columns)  # type: ignore[arg-type]
            found = traffic.judged()
            assert found.verdict == "abort" and found.reasons[0].startswith(figure), (kind, figure)
            assert not found.by_feedback


@pytest.mark.parametrize("kind", ["shadow", "canary"])
def test_without_feedback_as_many_answers_are_enough(kind: RolloutKind) -> None:
    traffic = Traffic(kind)
    traffic.add("1", [True] * 200)
    traffic.add("2", [False] * 200, shadow=kind == "shadow")
    found = traffic.judged()
    assert (found.verdict, found.num_counted) == ("finish", 200) and "without feedback" in found.reasons[0]
    assert found.agreement == (0.0 if kind == "shadow" else None)
    assert traffic.judged(201).verdict == "goes on"


def test_a_thumb_tells_nothing_about_another_answer_to_the_same_row() -> None:
    traffic, said = shadow(0.9, 0.5)
    found = traffic.judged(said=said.assign(label=None))
    assert not found.by_feedback and found.verdict == "finish"
    assert found.champion.num_judged == 400 and found.candidate.num_judged == 0
    on_shadow = feedback(traffic.frames[1])
    assert traffic.judged(said=on_shadow).verdict == "abort", "a label on the shadow's answer counts as well"


def test_a_canary_of_which_only_errors_are_reported_is_aborted_by_their_number() -> None:
    traffic, said = canary(0.95, 0.5)
    wrong = said[~said["is_right"].astype(bool)]
    found = traffic.judged(said=wrong)
    accuracy, errors = found.differences[:2]
    assert accuracy.points == 0.0 and not accuracy.is_worse
    assert errors.figure == "not said to be wrong" and errors.is_worse and found.verdict == "abort"


@pytest.mark.parametrize("asked", [{"is_random": True}, {"reviewer": "Jo"}, {"source": "command"}])
def test_as_many_reviewed_rows_of_each_version_say_nothing_about_the_number_of_errors(asked: dict[str, Any]) -> None:
    traffic, said = Traffic("canary"), []
    for version, number in (("1", 1800), ("2", 200)):
        rows = traffic.add(version, [each % 10 > 0 for each in range(number)])
        said.append(feedback(rows.head(200), time=1e6, **asked))
    found = traffic.judged(said=pd.concat(said))
    accuracy, errors = found.differences[:2]
    assert (accuracy.points, errors.points) == (0.0, 0.0) and found.verdict == "finish"
    assert (found.champion.num_judged, found.candidate.num_judged, found.candidate.num_right) == (200, 200, 180)


def test_a_canary_without_feedback_on_the_champion_goes_on() -> None:
    traffic, said = canary(0.97, 0.97, 200)
    mine = said[said["id"].isin(traffic.frames[1]["id"])]
    found = traffic.judged(said=mine)
    assert (found.num_counted, found.by_feedback, found.champion.num_judged) == (200, True, 0)
    assert (found.verdict, found.reasons) == ("goes on", ())
    assert "accuracy" not in [each.figure for each in found.differences]
    assert traffic.judged(said=said).verdict == "finish"
    assert traffic.judged(said=mine[~mine["is_right"]].head(5)).verdict == "goes on", "complaints alone"


def test_a_canary_is_compared_with_no_rows_of_the_champion_in_nothing() -> None:
    traffic = Traffic("canary")
    traffic.add("2", [True] * 200)
    found = traffic.judged()
    assert (found.differences, found.verdict) == ((), "goes on")


@pytest.mark.parametrize(("kind", "num_figures"), [("shadow", 3), ("canary", 4)])
def test_the_first_feedback_does_not_change_the_intervals_of_the_other_figures(
    kind: RolloutKind, num_figures: int
) -> None:
    traffic = Traffic(kind)
    said = feedback(traffic.add("1", [True] * 200))
    traffic.add("2", [True] * 200, shadow=kind == "shadow", is_failed=True)
    own = feedback(traffic.frames[1])
    before, after = traffic.judged(), traffic.judged(said=pd.concat([said, own]))
    kept = {each.figure: each for each in after.differences}
    assert all(kept[each.figure] == each for each in before.differences) and len(kept) == num_figures


def test_rows_of_other_versions_and_copies_do_not_count_for_a_canary() -> None:
    traffic, said = canary(0.9, 0.9)
    before = traffic.judged(said=said)
    traffic.add("3", [False] * 50)
    traffic.add("2", [False] * 50, shadow=True)
    assert traffic.judged(said=said) == before
    assert (before.champion.num_rows, before.candidate.num_rows) == (400, 400)
