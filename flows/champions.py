"""Flows that look after champions: score them again, watch their live traffic, end rollouts, harvest."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from prefect import flow

from deal_core.errors import DealError, in_one_line
from flows.promote import tell
from infra.promotions import PromotionLog
from infra.store.base import ObjectStore
from infra.store.opening import open_store
from infra.versions import ROLLOUT, Decision, Versions
from tasks.adaptation.evaluate import score_version
from tasks.lineage.history import find_version, known_lineages
from tasks.lineage.promotion import promote_to, reject_version
from tasks.monitoring.harvest import HarvestResult, harvest_feedback
from tasks.monitoring.look import MonitorResult, look_at
from tasks.monitoring.rollout import RolloutLook, look_at_rollout, require_open
from tasks.progress import Interrupted, in_stage, reporter, stage_done, stage_times, time_stages
from tasks.references import VersionScores

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


def has_champion(store: ObjectStore, lineage: str) -> bool:
    """Return whether a lineage has a champion."""
    return Versions(store).champion(lineage) is not None


async def for_each(
    store: ObjectStore,
    lineages: Sequence[str],
    act: Callable[[str], Awaitable[Result]],
    failure: str,
    is_due: Callable[[ObjectStore, str], bool] = has_champion,
) -> list[Result]:
    """Call `act` for each named lineage, one after another; without names, for every one for which `is_due` is true.

    A failed call does not stop the others.

    Raises:
        DealError: Calls failed; it says of which lineages, and why. `failure` says what: "could not be scored".
    """
    names = lineages or known_lineages(store)
    results, failed = [], []
    for name in names:
        try:
            if lineages or is_due(store, name):
                results.append(await act(name))
        except Interrupted:
            raise
        except Exception as error:
            logger.exception("Lineage %s %s", name, failure)
            failed.append(f"{name}: {in_one_line(error)}")
    if failed:
        raise DealError(f"Of {len(names)} lineages {len(failed)} {failure}. {' '.join(failed)}")
    return results


class EvaluateResult(VersionScores, frozen=True):
    """New and recorded accuracies of a version."""

    lineage: str
    version: str
    seconds: float


async def score_again(lineage: str, version: str | None = None) -> EvaluateResult:
    """Score a version on the frozen test rows of all its tasks. Report tasks on which it is worse than in its own run.

    Without a version, the champion is scored.

    Raises:
        RegistryError: There is no such version.
    """
    time_stages()
    store = open_store()
    scored = find_version(store, lineage, version)
    scores = await in_stage("evaluate", score_version, store, scored)
    stage_done("evaluate", f"{sum(scores.num_rows.values())} rows")
    for task, value in scores.accuracies.items():
        if (before := scores.recorded.get(task, 0.0)) > value:
            reporter().said(
                f"Version {scored.version} of {lineage} scores {value:.1%} on {task}, "
                f"below the {before:.1%} that its own run found."
            )
    seconds = stage_times()["evaluate"]
    return EvaluateResult(lineage=lineage, version=scored.version, seconds=seconds, **vars(scores))


evaluate = flow(name="evaluate", flow_run_name="evaluate-{lineage}")(score_again)
"""The same as a flow."""


@flow(name="evaluate-champions")
async def evaluate_champions(lineages: tuple[str, ...] = ()) -> list[EvaluateResult]:
    """Score the champions of several lineages, one after another.

    Args:
        lineages: Their names; empty: all lineages that have a champion.
    """
    return await for_each(open_store(), lineages, lambda name: evaluate(name), "could not be scored")


async def compare_traffic(lineage: str, data: str | None = None, new_reference: bool = False) -> MonitorResult:
    """Compare the live traffic of a lineage's champion with its reference. No model is needed.

    Args:
        lineage: The lineage.
        data: File of answers that another server gave, instead of the prediction log. Nothing is announced then.
        new_reference: Compare with the present live rows from now on, until another version is champion.
    """
    time_stages()
    result = await in_stage("compare", look_at, open_store(), lineage, data, new_reference)
    left_out = f"; {result.num_faulty} rows cannot be read and were left out" if result.num_faulty else ""
    stage_done("compare", (result.problem or f"{result.num_rows} rows of version {result.version}") + left_out)
    for alarm in result.new_alarms:
        reporter().said(f"{lineage}, {alarm.task}: {alarm.kind}. {'; '.join(alarm.reasons)}")
    return result


monitor = flow(name="monitor", flow_run_name="monitor-{lineage}")(compare_traffic)
"""The same as a flow."""


@flow(name="monitor-lineages")
async def monitor_lineages(lineages: tuple[str, ...] = ()) -> list[MonitorResult]:
    """Look at the live traffic of several lineages' champions, one after another.

    Args:
        lineages: Their names; empty: all lineages that have a champion.
    """
    return await for_each(open_store(), lineages, lambda name: monitor(name), "could not be looked at")


@flow(name="rollouts")
async def rollouts() -> list[RolloutLook]:
    """Look at all open rollouts, one after another, and end those that are decided."""
    store = open_store()
    log = PromotionLog(store)

    async def check(name: str) -> RolloutLook:
        result = check_rollout(store, name)
        if result.decision is not None:
            await tell(store, result.decision)
        return result

    return await for_each(
        store, (), check, "could not be looked at", lambda _, name: log.open_rollout(name) is not None
    )


def check_rollout(store: ObjectStore, lineage: str) -> RolloutLook:
    """Make the version that is tried the champion, reject it, or let its rollout go on.

    Raises:
        RegistryError: The champion has changed meanwhile, or the version cannot become champion.
    """
    status = look_at_rollout(store, lineage)
    if status.version is None or status.report is None or status.report.verdict == "goes on":
        return RolloutLook(status=status)
    why = f"{status.report.kind}: {'; '.join(status.report.reasons)}"
    if status.report.verdict == "abort":
        decision = reject_version(store, lineage, status.version, who=ROLLOUT, why=why)
    else:
        run = find_version(store, lineage, status.version).run_key
        decision = promote_to(store, lineage, status.version, who=ROLLOUT, why=why, run=run)
    return RolloutLook(status=status, decision=decision)


def finish_rollout(store: ObjectStore, lineage: str, *, who: str, why: str) -> Decision:
    """Make the version that is tried on live traffic the champion, whatever the figures say."""
    return promote_to(store, lineage, require_open(store, lineage).version, who=who, why=why)


def abort_rollout(store: ObjectStore, lineage: str, *, who: str, why: str) -> Decision:
    """Reject the version that is tried on live traffic."""
    return reject_version(store, lineage, require_open(store, lineage).version, who=who, why=why)


@flow(name="harvest", flow_run_name="harvest-{task}")
def harvest(task: str, lineage: str = "default") -> HarvestResult:
    """Write the reviewed right answers of a task into its inbox. What was harvested before does not land again.

    Args:
        task: The task.
        lineage: The lineage whose champion answered.
    """
    result = harvest_feedback(open_store(), task, lineage)
    landed = f"{result.num_rows} rows landed as {result.key}" if result.key else "nothing to harvest"
    reporter().said(f"Feedback on {task} of {lineage}: {landed}.")
    return result
