"""Plan what `deal gc` removes from a lineage. The functions are pure: from an inventory to a list of removals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from infra.tracking.facts import VersionInfo
from infra.tracking.runs import RunInfo

Kind = Literal["work folder", "adapter", "training rows", "prediction log", "feedback", "feedback without an answer",
               "temporary files"]  # fmt: skip


class Folder(NamedTuple):
    """A folder or a file: its address, its size and the time of its last change."""

    address: str
    """Key in the store, or path on this machine."""
    num_bytes: int
    modified: datetime


class Removal(BaseModel):
    """One thing to remove, with the reason."""

    model_config = ConfigDict(frozen=True)

    lineage: str
    kind: Kind
    address: str
    num_bytes: int
    reason: str
    version: str | None = None
    """The version of a removed adapter."""
    model_id: str | None = None
    """MLflow's model of this version."""


class Holdings(NamedTuple):
    """The inventory of a lineage that no process is working on."""

    lineage: str
    versions: Sequence[VersionInfo]
    """Oldest first."""
    runs: Sequence[RunInfo]
    adapters: Mapping[str, Folder]
    """By the short key of the run."""
    work: Mapping[str, Folder]
    """Work folders on this machine, by the short key of the run."""
    training_rows: Sequence[Folder]
    """Training rows that no arrival retains."""


def plan_removals(held: Holdings, *, now: datetime, older_than: timedelta) -> tuple[Removal, ...]:
    """Return the removals in a fixed order.

    No process is working on the lineage, so a run with the status RUNNING has died. Such a run and a failed run may
    continue from the checkpoint while their parent is champion and they are younger than the limit.

    `older_than` is the least age of training rows, of a rejected version's adapter, and of the folders of an open run.
    """
    cutoff = now - older_than
    version_of = {version.run_key[:16]: version for version in held.versions}
    run_of = {run.short_key: run for run in held.runs}
    kept = kept_versions(held.versions, cutoff)
    champion = next((version.version for version in held.versions if "champion" in version.aliases), None)
    found: list[Removal] = []

    def add(kind: Kind, folder: Folder, reason: str, version: VersionInfo | None = None) -> None:
        number, model_id = (version.version, version.model_id) if version else (None, None)
        found.append(Removal(
            lineage=held.lineage, kind=kind, address=folder.address, num_bytes=folder.num_bytes, reason=reason,
            version=number, model_id=model_id,
        ))  # fmt: skip

    for key, folder in sorted(held.work.items()):
        if version := version_of.get(key):  # steps after the registration need only the store
            add("work folder", folder, f"its run has registered version {version.version}")
        elif reason := _why_over(run_of.get(key), folder, champion, cutoff):
            add("work folder", folder, reason)
    for key, folder in sorted(held.adapters.items()):
        if version := version_of.get(key):
            if version.version not in kept:
                day = f"{version.created:%Y-%m-%d}"
                add("adapter", folder, f"version {version.version} of {day} was rejected", version)
        elif reason := _why_over(run_of.get(key), folder, champion, cutoff):
            add("adapter", folder, f"no version names it: {reason}")
    for folder in held.training_rows:
        if folder.modified < cutoff:  # a run on another machine may still read younger rows
            add("training rows", folder, "learned, or to be read anew from the file")
    return tuple(found)


def kept_versions(versions: Sequence[VersionInfo], cutoff: datetime) -> set[str]:
    """Return the numbers of the versions whose adapter stays.

    These are the accepted versions that no person rejected, versions with an alias, young versions, and all ancestors
    of these versions.
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


def _why_over(run: RunInfo | None, folder: Folder, champion: str | None, cutoff: datetime) -> str | None:
    """Why the run of a folder will not continue; None: the run may continue."""
    touched = max(folder.modified, run.touched) if run else folder.modified
    is_old = touched < cutoff
    if run is None:
        return "no run is known that it belongs to" if is_old else None
    if run.parent_version != champion:
        parent = f"version {run.parent_version}" if run.parent_version else "the base model"
        return f"its run continues {parent}, which is not champion any more"
    return f"its run was left on {touched:%Y-%m-%d}" if is_old else None
