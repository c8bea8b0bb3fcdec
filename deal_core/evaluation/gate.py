"""The gate decides whether a new version may become champion: a pure function of an evaluation and of limits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

from deal_core.evaluation.report import EvaluationReport, Scores, mean_score
from deal_core.evaluation.significance import PairedDrop, what_hits_tell
from deal_core.judging_config import GateConfig

_SLACK = 1e-9
"""Tolerance for rounding: a gain of 0.6 − 0.5 must not miss a floor of 10 points."""

CheckKind = Literal["floor", "gain", "drop", "mean_drop", "total_drop", "general_ability", "adapter"]


@dataclass(frozen=True, kw_only=True)
class FailedCheck:
    """One limit that a version breaks."""

    kind: CheckKind
    task: str | None
    """None: the check is about the version as a whole."""
    value: float | None
    """The measured value, in the limit's unit: percent for a floor, points for a gain or drop, else a ratio."""
    limit: float | None
    message: str


@dataclass(frozen=True)
class GateDecision:
    """Whether a version may become champion, with every reason against it."""

    failed_checks: tuple[FailedCheck, ...]
    notes: tuple[str, ...] = ()
    """Tasks and suites with too few rows to judge, and losses over a limit that noise explains."""
    unsure: tuple[str, ...] = ()
    """Of the notes, those about old tasks on which a drop of max_drop_points could not have been seen."""

    @property
    def accepted(self) -> bool:
        """Whether every check was passed."""
        return not self.failed_checks

    @property
    def reasons(self) -> tuple[str, ...]:
        """One sentence per failed check."""
        return tuple(check.message for check in self.failed_checks)


def decide(report: EvaluationReport, config: GateConfig) -> GateDecision:
    """Check a version against all limits, so that one run gives every reason.

    A reason reads: a: accuracy 50.0 % is below the floor of 55.0 % (base model's 45.0 % + 10.0 points).
    """
    all_drops = [_drop_of(report, task, config.confidence) for task in report.parent_accuracies]
    drops = [drop for drop in all_drops if drop.task not in report.slices]
    of_slices = [drop for drop in all_drops if drop.task in report.slices]
    of_suites = [*_drops_of_suites(report, config.confidence)]
    # A consolidation repairs old tasks: no task is new, and its parent has passed the floors.
    own_task = [] if report.is_consolidation else [*_below_floors(report, config), *_no_gain(report, config)]
    failed_checks = [
        *own_task,
        *_too_large(drops, config.max_drop_points),
        *_too_large(of_slices, config.max_old_slice_drop_points),
        *_mean_drop(drops, config),
        *_budget_spent(report, drops, config),
        *_general_ability(report, config),
        *_too_large(of_suites, config.max_general_drop_points, "general_ability"),
        *_adapter(report, config),
    ]
    unsure = [*_unseen(drops, config.max_drop_points, config.confidence)]
    notes = [
        *unsure,
        *_within_noise(drops, config.max_drop_points),
        *_unseen(of_suites, config.max_general_drop_points, config.confidence),
        *_within_noise(of_suites, config.max_general_drop_points),
        *_budget_notes(report, config),
    ]
    # a suite is compared twice, with the base model and with the champion, and too few rows are noted once
    return GateDecision(tuple(failed_checks), tuple(dict.fromkeys(notes)), tuple(unsure))


def _below_floors(report: EvaluationReport, config: GateConfig) -> Iterator[FailedCheck]:
    task, accuracy = report.task, report.accuracies[report.task]
    start, whose = report.base_accuracy, "base model's"
    if report.majority_rate is not None and report.majority_rate > start:  # a constant answer is no skill
        start, whose = report.majority_rate, "the commonest answer's"
    gain, reachable = config.min_gain_points, 50 * (1 - start)  # near 100 %, the full gain may be impossible
    wanted = f"{gain:.1f} points" if gain <= reachable else f"{reachable:.1f} points, half of what it lacks"
    floors = {start + min(gain, reachable) / 100: f" ({whose} {_percent(start)} + {wanted})"}
    if config.min_accuracy is not None:
        floors.setdefault(config.min_accuracy, "")
    for floor, origin in floors.items():
        if accuracy < floor - _SLACK:
            score = f"{report.metric_name(task)} {_percent(accuracy)}"
            message = f"{task}: {score} is below the floor of {_percent(floor)}{origin}."
            yield FailedCheck(kind="floor", task=task, value=100 * accuracy, limit=100 * floor, message=message)


def _no_gain(report: EvaluationReport, config: GateConfig) -> Iterator[FailedCheck]:
    wanted, before, task = config.min_gain_over_champion_points, report.parent_accuracy_new_task, report.task
    if wanted is None or before is None:
        return
    gain = 100 * (report.accuracies[task] - before)
    paired = report.paired_drop(task)
    noise = paired.noise(config.confidence) if paired else 0.0
    if wanted - gain > noise + 100 * _SLACK:
        yield FailedCheck(
            kind="gain",
            task=task,
            value=gain,
            limit=wanted,
            message=f"{task}: {report.metric_name(task)} {_percent(report.accuracies[task])} is {gain:+.1f} points "
            f"from the champion's {_percent(before)}, beyond noise; at least {wanted:+.1f} is required.",
        )


@dataclass(frozen=True, kw_only=True)
class _Drop:
    """The loss of an old task against the champion, or of a suite against the base model or the champion, in points."""

    task: str
    """The task or the suite."""
    points: float
    paired: PairedDrop | None
    is_clear: bool
    """The loss is more than noise explains. Without the parent's outcomes, every loss counts."""
    sentence: str
    """The loss in words, without a full stop."""


def _drop_of(report: EvaluationReport, task: str, confidence: float) -> _Drop:
    before, after, paired = report.parent_accuracies[task], report.accuracies[task], report.paired_drop(task)
    points = 100 * (before - after)
    fell = f"{task}: {report.metric_name(task)} fell by {points:.1f} points"
    return _Drop(
        task=task,
        points=points,
        paired=paired,
        is_clear=paired is None or paired.lower_bound(confidence) > 0,
        sentence=f"{fell}, from {_percent(before)} to {_percent(after)}",
    )


def _drops_of_suites(report: EvaluationReport, confidence: float) -> Iterator[_Drop]:
    """Each suite's losses, as answers of the base model and of the champion tell them."""

    def against(whose: str, suite: str, before: Scores, now: Scores) -> _Drop:
        paired = PairedDrop.of(before, now)
        after = f"from {_percent(mean_score(before))} to {_percent(mean_score(now))}"
        return _Drop(
            task=suite,
            points=paired.points,
            paired=paired,
            is_clear=paired.lower_bound(confidence) > 0,
            sentence=f"General ability: {suite} fell by {paired.points:.1f} points against the {whose}, {after}",
        )

    for suite, scores in report.general.items():
        yield against("base model", suite, scores.base, scores.now)
        if scores.parent is not None:
            yield against("champion", suite, scores.parent, scores.now)


def _too_large(drops: list[_Drop], limit: float | None, kind: CheckKind = "drop") -> Iterator[FailedCheck]:
    for drop in drops:
        if limit is not None and drop.points > limit + 100 * _SLACK and drop.is_clear:
            message = f"{drop.sentence}; the limit is {limit:.1f} points."
            yield FailedCheck(kind=kind, task=drop.task, value=drop.points, limit=limit, message=message)


def _mean_drop(drops: list[_Drop], config: GateConfig) -> Iterator[FailedCheck]:
    limit = config.max_mean_drop_points
    if limit is None or len(drops) < 2:
        return
    mean = sum(drop.points for drop in drops) / len(drops)
    variance = sum(drop.paired.standard_error**2 for drop in drops if drop.paired)
    noise = NormalDist().inv_cdf(config.confidence) * variance**0.5 / len(drops)
    if mean > limit + 100 * _SLACK and mean > noise:
        yield FailedCheck(
            kind="mean_drop",
            task=None,
            value=mean,
            limit=limit,
            message=f"The {len(drops)} old tasks fell by {mean:.1f} points on average; the limit is {limit:.1f}.",
        )


def _budget_spent(report: EvaluationReport, drops: list[_Drop], config: GateConfig) -> Iterator[FailedCheck]:
    """The tasks whose loss since they were learned is above the budget, if this version has added to it."""
    limit = config.max_total_drop_points
    for drop in drops:
        debt = report.debts.get(drop.task)
        if limit is None or debt is None:
            continue
        adds_to_it = drop.points > 100 * _SLACK
        is_too_large = debt.points > limit + 100 * _SLACK
        is_clear = debt.paired is None or debt.paired.lower_bound(config.confidence) > 0
        if adds_to_it and is_too_large and is_clear:
            message = (
                f"{drop.task}: {report.metric_name(drop.task)} has fallen by {debt.points:.1f} points since version "
                f"{debt.since} learned it; the budget is {limit:.1f} points. deal lineage consolidate learns all tasks "
                "together."
            )
            yield FailedCheck(kind="total_drop", task=drop.task, value=debt.points, limit=limit, message=message)


def _general_ability(report: EvaluationReport, config: GateConfig) -> Iterator[FailedCheck]:
    limit, now, before = config.max_perplexity_ratio, report.perplexity, report.base_perplexity
    if limit is None or now is None or not before:
        return
    ratio = now / before
    if not ratio <= limit:
        yield FailedCheck(
            kind="general_ability",
            task=None,
            value=ratio,
            limit=limit,
            message=f"General ability: perplexity of plain English is {now:.1f}, {ratio:.2f} times the base model's "
            f"{before:.1f}; the limit is {limit:.2f} times.",
        )


def _adapter(report: EvaluationReport, config: GateConfig) -> Iterator[FailedCheck]:
    facts = report.adapter
    if facts is None:
        return
    if not facts.is_changed:
        yield _of_adapter("The adapter is byte for byte that of the version it continues: nothing was learned.")
    if facts.norm is None or not math.isfinite(facts.norm):
        yield _of_adapter("The adapter holds numbers that are not finite.")
    elif facts.norm == 0:
        yield _of_adapter("The adapter is empty: it does not change the base model.", 0.0)
    elif config.max_norm_ratio is not None and facts.parent_norm:
        ratio = facts.norm / facts.parent_norm
        if not 1 / config.max_norm_ratio <= ratio <= config.max_norm_ratio:
            yield _of_adapter(
                f"The adapter's norm {facts.norm:.3g} is {ratio:.2f} times that of the version it continues; it may be "
                f"{1 / config.max_norm_ratio:.2f} to {config.max_norm_ratio:.2f} times.",
                ratio,
                config.max_norm_ratio,
            )


def _of_adapter(message: str, value: float | None = None, limit: float | None = None) -> FailedCheck:
    return FailedCheck(kind="adapter", task=None, value=value, limit=limit, message=message)


def _unseen(drops: list[_Drop], max_points: float | None, confidence: float) -> Iterator[str]:
    """What too few rows could have seen, for each loss of which they could not have seen the limit."""
    for drop in drops:
        if max_points is None or drop.paired is None:
            continue
        limit = max(max_points, 100 / drop.paired.num_rows) + 100 * _SLACK
        visible = what_hits_tell(drop.paired.num_rows, limit, confidence) if drop.paired.are_hits else None
        noise = drop.paired.noise(confidence)  # of answers that changed both ways, or of graded scores
        if visible is None and noise > limit:
            visible = f"a drop only from about {noise:.1f} points on"
        if visible:
            yield (
                f"{drop.task}: too few test rows to judge: {drop.paired.num_rows} can tell {visible}; the limit is "
                f"{max_points:.1f}."
            )


def _within_noise(drops: list[_Drop], max_points: float | None) -> Iterator[str]:
    for drop in drops:
        if max_points is None:
            continue
        if drop.paired is None:
            yield f"{drop.task}: the champion's answers were not kept; its drop is judged without allowing for noise."
        elif drop.points > max_points + 100 * _SLACK and not drop.is_clear:
            yield f"{drop.sentence}: over the limit, but within the noise of {drop.paired.num_rows} test rows."


def _budget_notes(report: EvaluationReport, config: GateConfig) -> Iterator[str]:
    if config.max_total_drop_points is None:
        return
    for task, debt in report.debts.items():
        if debt.paired is None:
            yield (
                f"{task}: the answers of version {debt.since}, which learned it, are not kept; its loss since then is "
                "judged without allowing for noise."
            )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
