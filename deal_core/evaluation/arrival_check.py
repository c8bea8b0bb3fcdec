"""Is an arrival answered as its task's rows are? If not: do its labels disagree, or are its texts new?

The champion answers an arrival of a task that it knows before anything is trained. Two figures tell: the score, and the
estimate of the score from the champion's confidence, which no label can change. Wrong labels lower the score alone. New
texts lower both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import ClassVar, Literal

from pydantic import ConfigDict

from deal_core.evaluation.estimate import above_threshold
from deal_core.evaluation.interval import score_text, wilson_interval

Verdict = Literal["as expected", "labels disagree", "texts are new", "lower"]
"""labels disagree: the score is clearly below the reference, and the confidence does not explain that. texts are new:
the confidence has fallen too. lower: the score is clearly below the reference, and nothing can tell why."""
LEVEL = 0.01
"""A score is below the reference if chance explains less than this: at most one good arrival in a hundred."""
EXPLAINED = 1 / 3
"""The share of a fall from which on the confidence explains it."""
MIN_CALIBRATION = 30
"""Fewest test rows from which the score is estimated."""
MAX_REFERENCE = 200
"""Most rows of a reference: with more, months and years count that the champion has long left behind."""
_RESAMPLES = 9999
_SLACK = 1e-9


@dataclass(frozen=True, kw_only=True)
class AnsweredRows:
    """Rows that a champion has answered."""

    scores: Sequence[float]
    """Each row's score, 0 to 1."""
    confidences: Sequence[float] = ()
    """How sure the champion was of each answer; empty: not known."""


@dataclass(frozen=True, kw_only=True)
class ArrivalScore:
    """What the champion scored on an arrival of a task that it knows, before any training. Scores are 0 to 1."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    accuracy: float
    low: float
    """Lower end of its 95 % interval."""
    high: float
    num_rows: int
    """Rows that were asked."""
    of_rows: int = 0
    """Rows of the arrival, training and test rows."""
    num_learned: int = 0
    """Rows of the arrival that were left out because the line of the champion has learned their texts."""
    reference: float | None = None
    """Score on the task's test rows and its newest arrivals; None: there is nothing to compare with."""
    num_reference: int = 0
    """Rows of the reference."""
    p_value: float | None = None
    """Probability of so low a score if the arrival is as the reference; None: there is no reference."""
    estimate: float | None = None
    """The score that the champion's confidence lets expect; None: it cannot be estimated."""
    verdict: Verdict = "as expected"
    is_released: bool = False
    """Whether the arrival was held, and a person has let it go on."""

    def score(self) -> str:
        """The score in per cent, as tables have it."""
        return score_text(self.accuracy, self.num_rows)

    @property
    def figure(self) -> str:
        """The score with its interval and its rows."""
        return f"{100 * self.accuracy:.1f} % ({100 * self.low:.0f}–{100 * self.high:.0f}, n {self.num_rows})"

    def sentence(self, version: str, *, has_labels: bool = True) -> str:
        """Say what the champion, named by its number, scored, and what that means."""
        what = "labels" if has_labels else "right answers"
        if self.verdict == "as expected":
            left_out = f"; {self.num_learned} rows that it has learned were left out" if self.num_learned else ""
            return f"version {version} scored {self.figure} on the arrival before the training{left_out}"
        assert self.reference is not None, "a score is low against a reference"
        agree = (
            f"{100 * self.accuracy:.0f} % of the {what} agree with version {version} "
            f"(reference {100 * self.reference:.0f} %, {self.num_reference} rows)"
        )
        why = {
            "labels disagree": f"and it is sure of its answers. Are the {what} wrong?",
            "texts are new": "and it is unsure of its answers: the texts are new to it",
            "lower": f"and nothing tells whether the {what} are wrong or the texts are new",
        }
        return f"{agree}, {why[self.verdict]}"


def judge_arrival(
    arrival: AnsweredRows, *, reference: Sequence[float], calibration: AnsweredRows, drop_points: float
) -> ArrivalScore:
    """Compare a champion's answers to an arrival with those to rows that it has not learned.

    The score is low if it is at least `drop_points` points below the reference and chance does not explain that: by
    Fisher's exact test, one-sided, or for graded scores by permutation. Then the fall of the estimate decides.

    Args:
        arrival: The arrival's rows, at least one.
        reference: The scores of the reference rows; empty: there are none.
        calibration: The task's test rows, which say how confidence and right answers go together.
        drop_points: The smallest fall that counts, in points (0.01).
    """
    accuracy, num_rows = fmean(arrival.scores), len(arrival.scores)
    low, high = wilson_interval(accuracy, num_rows)
    score = ArrivalScore(
        accuracy=accuracy,
        low=low,
        high=high,
        num_rows=num_rows,
        estimate=estimated_score(calibration, arrival.confidences),
    )
    if not len(reference):
        return score
    expected = fmean(reference)
    fall, p_value = expected - accuracy, _chance_of_less(arrival.scores, reference)
    verdict: Verdict = "as expected"
    if 100 * fall >= drop_points - _SLACK and p_value < LEVEL:
        if score.estimate is None:
            verdict = "lower"
        else:
            explained = fmean(calibration.scores) - score.estimate
            verdict = "labels disagree" if explained < EXPLAINED * fall else "texts are new"
    return replace(score, reference=expected, num_reference=len(reference), p_value=p_value, verdict=verdict)


def estimated_score(calibration: AnsweredRows, confidences: Sequence[float]) -> float | None:
    """Estimate the score of rows from the champion's confidence in its answers to them; see `above_threshold`.

    None: there are too few test rows, their scores are graded or all 0, or confidences are missing.
    """
    num_rows, num_right = len(calibration.scores), round(sum(calibration.scores))
    if num_rows < MIN_CALIBRATION or not num_right or not _are_hits(calibration.scores):
        return None
    if not len(confidences) or len(calibration.confidences) != num_rows:
        return None
    above = above_threshold(calibration.confidences, num_right, confidences)
    shift = (num_right - above.num_reference) / num_rows
    return min(1.0, max(0.0, above.num_live / len(confidences) + shift))


def surest_contradictions(arrival: AnsweredRows, number: int) -> list[int]:
    """Return the places of the rows of score 0 whose answers the champion was surest of, the surest first."""
    missed = [place for place, score in enumerate(arrival.scores) if score == 0]
    return sorted(missed, key=lambda place: -arrival.confidences[place])[:number] if arrival.confidences else []


def _are_hits(scores: Sequence[float]) -> bool:
    return all(score in (0, 1) for score in scores)


def _chance_of_less(scores: Sequence[float], reference: Sequence[float]) -> float:
    """The probability of at most this mean score if both samples come from one distribution."""
    import numpy as np  # every command reads versions, and few commands compare rows
    from scipy import stats

    if _are_hits(scores) and _are_hits(reference):
        sides = [(round(sum(side)), len(side) - round(sum(side))) for side in (scores, reference)]
        return float(stats.fisher_exact(sides, alternative="less").pvalue)
    test = stats.permutation_test(
        (np.asarray(scores, dtype=np.float64), np.asarray(reference, dtype=np.float64)),
        lambda first, second, axis: first.mean(axis) - second.mean(axis),
        alternative="less",
        n_resamples=_RESAMPLES,
        vectorized=True,
        rng=np.random.default_rng(0),
    )
    return float(test.pvalue)
