"""Evaluate: score a registered version again on the frozen test rows of all its tasks."""

from __future__ import annotations

from prefect import flow
from pydantic import BaseModel

from deal_core.config import EvaluateConfig
from infra.tracking.registry import open_registry
from tasks.adaptation.evaluate import score_version
from tasks.context import current_store
from tasks.lineage.history import find_version, version_ref
from tasks.lineage.settings import for_each, list_lineages
from tasks.progress import Stages, reporter


class EvaluateResult(BaseModel, frozen=True):
    """New and recorded accuracies of a version."""

    lineage: str
    version: str
    accuracies: dict[str, float]
    recorded: dict[str, float]
    """Accuracies that the version's own run found."""
    num_rows: dict[str, int]
    unjudged: dict[str, str] = {}
    """Tasks whose test rows were forgotten, and what to do."""
    seconds: float


@flow(name="evaluate", flow_run_name="evaluate-{lineage}")
async def evaluate(lineage: str, version: str | None = None) -> EvaluateResult:
    """Score a version on the frozen test rows of all its tasks. Report tasks on which it is worse than in its own run.

    Args:
        lineage: The lineage.
        version: Number of the version; None: the champion.

    Raises:
        RegistryError: There is no such version.
    """
    stages = Stages()
    found = version_ref(find_version(open_registry(), lineage, version))
    scores = await stages.run("evaluate", score_version, found, EvaluateConfig())
    stages.done("evaluate", f"{sum(scores.num_rows.values())} rows")
    for task, value in scores.accuracies.items():
        if (before := scores.recorded.get(task, 0.0)) > value:
            reporter().said(
                f"Version {found.version} of {lineage} scores {value:.1%} on {task}, "
                f"below the {before:.1%} that its own run found."
            )
    return EvaluateResult(
        lineage=lineage, version=found.version, accuracies=scores.accuracies, recorded=scores.recorded,
        num_rows=scores.num_rows, unjudged=scores.unjudged, seconds=stages.seconds["evaluate"],
    )  # fmt: skip


@flow(name="evaluate-champions")
async def evaluate_champions(lineages: tuple[str, ...] = ()) -> list[EvaluateResult]:
    """Score the champions of several lineages, one after another.

    Args:
        lineages: Their names; empty: all lineages in the server's settings that have a champion.

    Raises:
        DealError: Some champions could not be scored. All others were scored.
    """
    registry = open_registry()
    names = lineages or tuple(each.lineage for each in list_lineages(current_store()))

    async def score(name: str) -> EvaluateResult | None:
        return await evaluate(name) if lineages or registry.champion(name) else None

    return [each for each in await for_each(names, score, "could not be scored") if each is not None]
