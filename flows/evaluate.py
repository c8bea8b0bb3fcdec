"""Evaluate: score a version afresh on the frozen test rows of every task it knows."""

from __future__ import annotations

from prefect import flow
from pydantic import BaseModel

from deal_core.config import EvaluateConfig
from deal_core.errors import DealError
from infra.tracking.registry import open_registry
from tasks.adaptation.evaluate import score_version
from tasks.context import current_store
from tasks.lineage.history import find_version
from tasks.lineage.settings import for_each, list_lineages
from tasks.lineage.versions import version_ref
from tasks.progress import Stages, reporter


class EvaluateResult(BaseModel, frozen=True):
    """Fresh accuracies of a version beside those of its own run."""

    lineage: str
    version: str
    accuracies: dict[str, float]
    recorded: dict[str, float]
    """What the version's own run found."""
    num_rows: dict[str, int]
    unjudged: dict[str, str] = {}
    """Tasks whose test rows were forgotten, and what to do."""
    seconds: float


@flow(name="evaluate", flow_run_name="evaluate-{lineage}")
async def evaluate(lineage: str, version: str | None = None) -> EvaluateResult:
    """Score a version, and say where it has become worse than its own run found.

    Args:
        lineage: whose version.
        version: its number; None: the champion.

    Raises:
        RegistryError: there is no such version.
    """
    stages = Stages()
    found = version_ref(find_version(open_registry(), lineage, version))
    scores = await stages.run("evaluate", score_version, found, EvaluateConfig())
    stages.done("evaluate", f"{sum(scores.num_rows.values())} rows")
    for task, value in scores.accuracies.items():
        if (before := scores.recorded.get(task, 0.0)) > value:
            reporter().said(
                f"Version {found.version} of {lineage} has an accuracy of {value:.1%} on {task}, "
                f"below the {before:.1%} that its own run found."
            )
    return EvaluateResult(
        lineage=lineage,
        version=found.version,
        accuracies=scores.accuracies,
        recorded=scores.recorded,
        num_rows=scores.num_rows,
        unjudged=scores.unjudged,
        seconds=stages.seconds["evaluate"],
    )


@flow(name="evaluate-champions")
async def evaluate_champions(lineages: tuple[str, ...] = ()) -> list[EvaluateResult]:
    """Score the champions of several lineages, one after another.

    Args:
        lineages: their names; none: every lineage that the server looks after and that has a champion.

    Raises:
        DealError: of some lineage no champion could be scored; of all the others it was.
    """
    registry = open_registry()
    names = lineages or tuple(each.lineage for each in list_lineages(current_store()))

    async def score(name: str) -> EvaluateResult | None:
        return await evaluate(name) if lineages or registry.champion(name) else None

    found, failed = await for_each(names, score, "The champion of lineage %s could not be scored")
    if failed:
        raise DealError(f"Of {len(names)} lineages {len(failed)} could not be scored. {' '.join(failed)}")
    return [each for each in found if each is not None]
