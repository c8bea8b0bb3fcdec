"""Garbage: what of a lineage nobody will need again. Pure: from what there is to the exact list of removals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from infra.tracking.registry import VersionInfo
from infra.tracking.runs import RunInfo

Kind = Literal["work folder", "adapter", "training rows", "temporary files"]


class Folder(NamedTuple):
    """Something that lies around: where, how large, and when it was last written to."""

    address: str
    """Key in the store, or path on this machine."""
    num_bytes: int
    modified: datetime


class Removal(BaseModel):
    """One thing to remove, and why."""

    model_config = ConfigDict(frozen=True)

    lineage: str
    kind: Kind
    address: str
    num_bytes: int
    reason: str
    version: str | None = None
    """Version whose adapter it is."""
    model_id: str | None = None
    """MLflow's model of that version."""


class Holdings(NamedTuple):
    """What there is of a lineage while nobody works on it."""

    lineage: str
    versions: Sequence[VersionInfo]
    """Oldest first."""
    runs: Sequence[RunInfo]
    adapters: Mapping[str, Folder]
    """By the short key of the run that made each."""
    work: Mapping[str, Folder]
    """Work folders of this machine, by short key."""
    training_rows: Sequence[Folder]
    """Those that no arrival asked to retain."""


def plan_removals(held: Holdings, *, now: datetime, older_than: timedelta) -> tuple[Removal, ...]:
    """What can go, in a fixed order.

    Nobody works on the lineage, so a run that MLflow calls running has died. It may still go on from its checkpoint, as
    a failed one may, while its parent is champion and it is not older than the limit.

    Args:
        held: what there is.
        now: the time.
        older_than: how old training rows, a rejected version's adapter, and what a run left that may go on, must be.
    """
    plan = _Plan(held, now - older_than)
    return (*plan.work_folders(), *plan.adapters(), *plan.training_rows())


def kept_versions(versions: Sequence[VersionInfo], cutoff: datetime) -> set[str]:
    """Numbers of the versions whose adapter stays: good ones, with an alias, young, and all that these descend from.

    Good are those that the gate accepted and nobody refused.
    """
    by_number = {version.version: version for version in versions}
    kept: set[str] = set()
    waiting = [
        v.version for v in versions
        if (v.accepted and v.approval != "refused") or v.aliases or v.created > cutoff
    ]  # fmt: skip
    while waiting:
        number = waiting.pop()
        if number in kept or number not in by_number:
            continue
        kept.add(number)
        parent = by_number[number].parent_version
        waiting += [parent] if parent else []
    return kept


class _Plan:
    def __init__(self, held: Holdings, cutoff: datetime) -> None:
        self._held = held
        self._cutoff = cutoff
        self._version_of = {version.run_key[:16]: version for version in held.versions}
        self._run_of = {run.short_key: run for run in held.runs}
        self._kept = kept_versions(held.versions, cutoff)
        champions = [version.version for version in held.versions if "champion" in version.aliases]
        self._champion = champions[0] if champions else None

    def work_folders(self) -> list[Removal]:
        found = []
        for key, folder in sorted(self._held.work.items()):
            reason = self._over(key, folder)
            if reason:
                found.append(self._removal("work folder", folder, reason))
        return found

    def adapters(self) -> list[Removal]:
        found = []
        for key, folder in sorted(self._held.adapters.items()):
            version = self._version_of.get(key)
            if version is None:
                reason = self._over(key, folder)
                if reason:
                    found.append(self._removal("adapter", folder, f"no version names it: {reason}"))
            elif version.version not in self._kept:
                day = f"{version.created:%Y-%m-%d}"
                reason = f"version {version.version} of {day} was rejected"
                removal = self._removal("adapter", folder, reason)
                found.append(removal.model_copy(update={"version": version.version, "model_id": version.model_id}))
        return found

    def training_rows(self) -> list[Removal]:
        return [
            self._removal("training rows", folder, "learned, or to be read anew from the file")
            for folder in self._held.training_rows
            if folder.modified < self._cutoff  # a run of another machine may be about to read what is younger
        ]

    def _over(self, key: str, folder: Folder) -> str | None:
        """Why the run that left the folder will not go on; None: it may."""
        version, run = self._version_of.get(key), self._run_of.get(key)
        touched = max(folder.modified, run.touched) if run else folder.modified
        is_old = touched < self._cutoff
        if version is not None:  # what a crash left undone after that is done from the store
            return f"its run has registered version {version.version}"
        if run is None:
            return "no run is known that it belongs to" if is_old else None
        if run.parent_version != self._champion:
            parent = f"version {run.parent_version}" if run.parent_version else "the base model"
            return f"its run continues {parent}, which is not champion any more"
        return f"its run was left on {touched:%Y-%m-%d}" if is_old else None

    def _removal(self, kind: Kind, folder: Folder, reason: str) -> Removal:
        return Removal(
            lineage=self._held.lineage, kind=kind, address=folder.address, num_bytes=folder.num_bytes, reason=reason
        )
