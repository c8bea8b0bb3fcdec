"""When a lineage is consolidated: the section `consolidate` of its file, and the one function that decides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel

from deal_core.limits import Count, Flag
from infra.versions import Version, descent

Start = Literal["base", "champion"]
"""Where the weights of a consolidation start."""


class ConsolidatePolicy(BaseModel, frozen=True, extra="forbid"):
    """When what lands is followed by a consolidation: one training on all rows that are left of all arrivals.

    These settings change no version and no digest. `deal adapt FILE` does not ask them.
    """

    when_spent: Flag = False
    """Consolidate when the forgetting budget is spent: a task of the champion has lost more than
    gate.max_total_drop_points, or a version was rejected for that. What was rejected is then learned again."""
    every_arrivals: Count | None = None
    """Consolidate when the champion has learned this number of arrivals since its last consolidation."""
    start: Start = "base"
    """Whether the training starts from the base model, or from the champion."""

    @property
    def is_on(self) -> bool:
        """Whether anything is ever consolidated without a command."""
        return self.when_spent or self.every_arrivals is not None


NEVER = ConsolidatePolicy()


def arrivals_since(versions: Sequence[Version], champion: Version) -> int:
    """Return how many arrivals the champion has learned since its last consolidation."""
    line = descent(versions, champion)
    return next((number for number, version in enumerate(line) if version.is_consolidation), len(line))


def champion_of(versions: Sequence[Version]) -> Version | None:
    """Return the champion among the versions of a lineage."""
    return next((version for version in versions if "champion" in version.aliases), None)


def spent_by(versions: Sequence[Version], parent: str | None) -> tuple[Version, ...]:
    """Return the versions that continue a version and were rejected because the forgetting budget was spent."""
    return tuple(
        version
        for version in versions
        if version.parent_version == parent and any(check["kind"] == "total_drop" for check in version.failed_checks)
    )


def why_due(policy: ConsolidatePolicy, versions: Sequence[Version], budget_points: float | None) -> str | None:
    """Decide whether a lineage is to be consolidated now: why it is, in one sentence; None: it is not.

    A champion is consolidated once: a consolidation that was rejected, or waits, is not followed by another one.
    """
    champion = champion_of(versions)
    if champion is None:
        return None
    if any(version.is_consolidation and version.parent_version == champion.version for version in versions):
        return None
    since = arrivals_since(versions, champion)
    if policy.every_arrivals is not None and since >= policy.every_arrivals:
        return f"{since} arrivals were learned since the last consolidation."
    if policy.when_spent and budget_points is not None and since:
        if rejected := spent_by(versions, champion.version):
            return f"The forgetting budget is spent: version {rejected[-1].version} was rejected for it."
        task = max(champion.debts, key=lambda name: champion.debts[name], default=None)
        if task is not None and champion.debts[task] > budget_points:
            return (
                f"The forgetting budget is spent: {task} has lost {champion.debts[task]:.1f} of {budget_points:.1f} "
                "points."
            )
    return None
