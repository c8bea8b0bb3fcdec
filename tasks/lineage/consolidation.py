"""Consolidations: when a lineage is consolidated (the section `consolidate` of its file), and what is learned then."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel

from deal_core.limits import Count, Flag
from deal_core.safe_text import listed
from deal_core.shown import Shown
from infra.store import keys
from infra.versions import LearnedArrival, Version, champion_of, descent
from tasks.references import DatasetRef

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


def spent_by(versions: Sequence[Version], parent: str | None) -> tuple[Version, ...]:
    """Return the versions that continue a version and were rejected because the forgetting budget was spent."""
    return tuple(
        version
        for version in versions
        if version.parent_version == parent
        and version.branch is None  # no file of the inbox waits for it
        and any(check["kind"] == "total_drop" for check in version.failed_checks)
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


Source = Literal["retained", "files", "kept", "none"]
"""retained: the dataset in the store has its training rows. files: they are read from the files that landed. kept: only
the rows that the method kept of its task are left. none: no row is."""
_SOURCES = {"retained": "retained rows", "files": "landed files", "kept": "kept rows only", "none": "gone"}


class LearnedRows(BaseModel, frozen=True):
    """An arrival of the champion's line, and what is left of its rows."""

    version: Annotated[str, Shown()]
    """The version that learned it."""
    task: Annotated[str, Shown()]
    dataset_sha256: str
    source: Annotated[Source, Shown("from", words=_SOURCES)]
    num_rows: Annotated[int, Shown("rows")]
    """Training rows that it had; 0 if they are gone."""
    why: Annotated[str, Shown()] = ""
    """Why its rows are gone; empty: they are not."""


class ConsolidationPlan(BaseModel, frozen=True):
    """What a consolidation learns, and from what it starts."""

    lineage: str
    champion: str
    """The version that it is judged against."""
    start: Start
    """Whether its weights start from the base model or from the champion."""
    parts: tuple[LearnedRows, ...]
    """The arrivals, oldest first."""
    kept: dict[str, int]
    """For each task of which kept rows are learned, their number."""
    gone: tuple[str, ...]
    """Tasks of which no row is left."""
    num_rows: int
    """Rows that are learned, at most: equal ones are learned once."""
    seconds: float | None
    """About how long the training takes at the speed of the champion's; None: it is not known."""

    @property
    def arrivals(self) -> tuple[LearnedArrival, ...]:
        """The arrivals that the version learns."""
        return tuple(
            LearnedArrival(
                task=part.task, dataset_sha256=part.dataset_sha256, rows="kept" if part.source == "kept" else "all"
            )
            for part in self.parts
            if part.source != "none"
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks about the rows, for the report."""
        all_rows = [part for part in self.parts if part.source in ("retained", "files")]
        notes = [f"{len(all_rows)} of {len(self.parts)} arrivals were learned together, from the {self.start}"]
        if self.kept:
            kept = listed([f"{number} of {name}" for name, number in self.kept.items()])
            notes.append(f"of arrivals without their rows, the kept ones were learned: {kept}")
        if self.gone:
            notes.append(f"no row is left of {listed(self.gone)}")
        return tuple(notes)

    def as_dataset(self, task: str) -> DatasetRef:
        """Return all rows together as the dataset of a run that names this task. It has no folder in the store."""
        settled = [self.start, *((part.dataset_sha256, part.source) for part in self.parts), sorted(self.kept.items())]
        sha256 = hashlib.sha256(json.dumps(["consolidation", *settled]).encode()).hexdigest()
        return DatasetRef(
            task=task,
            uri=keys.dataset_uri(task, sha256, self.lineage, "consolidation"),
            sha256=sha256,
            num_train=self.num_rows,
            num_test=0,
            num_rejected=0,
            landed_sha256=sha256,
        )
