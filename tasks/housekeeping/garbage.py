"""What `deal data gc` removes: an inventory of a lineage's files and of those of killed processes, and the plan.

`deal data delete` looks at the same places.
"""

from __future__ import annotations

import shutil
import stat
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from filelock import FileLock
from pydantic import BaseModel

from deal_core.adapter.files import WEIGHTS_FILE
from deal_core.data.schema import is_name
from deal_core.errors import StoreError
from deal_core.shown import Shown
from infra.branches import Branch, Branches, tip_of
from infra.disk import disk_full
from infra.log_batches import Log, beyond_retention, merge_batches
from infra.predictions import feedback_log, prediction_log
from infra.run_journal import Run, RunJournal
from infra.settings import HomeSettings
from infra.store import keys
from infra.store.base import LOCK, RESERVED, TEMPORARY, ObjectInfo, ObjectStore
from infra.store.keys import ADAPTERS, DATASETS, FEEDBACK, PREDICTIONS, TRAIN_FILE
from infra.store.local import FileStore, is_deserted
from infra.versions import Version, Versions, champion_of
from tasks.lineage.datasets import retains_training_rows

AGE = timedelta(days=1)
"""Age at which a temporary file without a lock counts as left by a killed process."""
Kind = Literal[
    "work folder",
    "adapter",
    "training rows",
    "prediction log",
    "feedback",
    "temporary files",
    "unfinished upload",
]


class Folder(NamedTuple):
    """A folder or a file: its address, its size and the time of its last change."""

    address: str
    """Key in the store, or path on this machine."""
    num_bytes: int
    modified: datetime


class Removal(BaseModel, frozen=True):
    """One thing to remove, with the reason."""

    lineage: Annotated[str, Shown()]
    """Empty: it belongs to no lineage."""
    kind: Annotated[Kind, Shown("what")]
    address: Annotated[str, Shown("where")]
    """Key in the store, or path on this machine."""
    num_bytes: Annotated[int, Shown("size", unit="bytes")]
    reason: Annotated[str, Shown("why")]
    """Why it is not needed."""
    version: str | None = None
    """The version of a removed adapter."""


class Inventory(NamedTuple):
    """The inventory of a lineage that no process is working on."""

    lineage: str
    versions: Sequence[Version]
    """Oldest first."""
    runs: Sequence[Run]
    adapters: Mapping[str, Folder]
    """By the short key of the run."""
    work: Mapping[str, Folder]
    """Work folders on this machine, by the short key of the run."""
    training_rows: Sequence[Folder]
    """Training rows that no arrival retains."""
    branch: Branch | None = None
    """The open branch."""


def plan_removals(inventory: Inventory, *, now: datetime, older_than: timedelta) -> tuple[Removal, ...]:
    """Return the removals in a fixed order.

    No process is working on the lineage, so a run with the state "running" has died. Such a run and a failed run may
    continue from the checkpoint while their parent is champion, or the newest version of an open branch, and they are
    younger than the limit.

    `older_than` is the least age of training rows, of a rejected version's adapter, and of the folders of an open run.
    """
    cutoff = now - older_than
    version_of = {version.short_key: version for version in inventory.versions}
    run_of = {run.short_key: run for run in inventory.runs}
    kept = kept_versions(inventory.versions, cutoff)
    champion = champion_of(inventory.versions)
    parents = {champion.version if champion else None}
    if inventory.branch is not None:  # its runs continue what it has made
        tip = tip_of(inventory.branch, inventory.versions)
        parents.add(tip.version if tip else None)
    removals: list[Removal] = []

    def add(kind: Kind, folder: Folder, reason: str, version: str | None = None) -> None:
        removals.append(_removal(inventory.lineage, kind, folder, reason, version))

    for key, folder in sorted(inventory.work.items()):
        if version := version_of.get(key):  # steps after the registration need only the store
            add("work folder", folder, f"its run has registered version {version.version}")
        elif reason := _why_over(run_of.get(key), folder, parents, cutoff):
            add("work folder", folder, reason)
    for key, folder in sorted(inventory.adapters.items()):
        if version := version_of.get(key):
            if version.version not in kept:
                day = f"{version.created:%Y-%m-%d}"
                add("adapter", folder, f"version {version.version} of {day} was rejected", version.version)
        elif reason := _why_over(run_of.get(key), folder, parents, cutoff):
            add("adapter", folder, f"no version names it: {reason}")
    for folder in inventory.training_rows:
        if folder.modified < cutoff:  # a run on another machine may still read younger rows
            add("training rows", folder, "learned, or to be read anew from the file")
    return tuple(removals)


def _removal(lineage: str, kind: Kind, folder: Folder, reason: str, version: str | None = None) -> Removal:
    return Removal(
        lineage=lineage,
        kind=kind,
        address=folder.address,
        num_bytes=folder.num_bytes,
        reason=reason,
        version=version,
    )


def kept_versions(versions: Sequence[Version], cutoff: datetime) -> set[str]:
    """Return the numbers of the versions whose adapter stays. `versions` are those of a lineage, oldest first.

    These are the accepted versions that no person rejected, versions with an alias, young versions, and all ancestors
    of these versions.
    """
    kept: set[str] = set()
    parents: set[str | None] = set()
    for version in reversed(versions):  # a parent is older than its children
        if not version.is_rejected or version.aliases or version.created > cutoff or version.version in parents:
            kept.add(version.version)
            parents.add(version.parent_version)
    return kept


def _why_over(run: Run | None, folder: Folder, parents: Collection[str | None], cutoff: datetime) -> str | None:
    """Why the run of a folder will not continue; None: it may. Runs continue only `parents` (None: the base model)."""
    touched = max(folder.modified, run.touched) if run else folder.modified
    is_old = touched < cutoff
    if run is None:
        return "no run is known that it belongs to" if is_old else None
    if run.parent_version not in parents:
        parent = f"version {run.parent_version}" if run.parent_version else "the base model"
        return f"its run continues {parent}, which is not champion any more"
    return f"its run was left on {touched:%Y-%m-%d}" if is_old else None


def list_all_lineages(store: ObjectStore) -> tuple[str, ...]:
    """Return every lineage with a version, an adapter or a dataset in the store, or a work folder on this machine."""
    names = set(Versions(store).lineages())
    names |= {file.lineage for info in store.list(ADAPTERS) if (file := keys.parse_adapter_file(info.key))}
    names |= {dataset.lineage for info in store.list(DATASETS) if (dataset := keys.parse_dataset_file(info.key))}
    work = HomeSettings().home / "work"
    names |= {path.name for path in work.iterdir() if path.is_dir()} if work.is_dir() else set()
    return tuple(sorted(names))


def list_logged_lineages(store: ObjectStore) -> tuple[str, ...]:
    """Return every lineage with a prediction log or feedback."""
    names = {keys.lineage_of(info.key) for log in (PREDICTIONS, FEEDBACK) for info in store.list(log)}
    return tuple(sorted(filter(is_name, names)))


def merge_logs(store: ObjectStore, lineage: str) -> None:
    """Join the small batches of a lineage's logs. The caller holds the lineage."""
    for log in (prediction_log(lineage), feedback_log(lineage)):
        merge_batches(store, log)


def old_logs(store: ObjectStore, lineage: str, *, now: datetime, days: int) -> tuple[Removal, ...]:
    """Return the days of a lineage's prediction log and of its feedback that are older than the retention."""
    logs: Mapping[Kind, Log] = {"prediction log": prediction_log(lineage), "feedback": feedback_log(lineage)}
    reason = f"older than {days} days (DEAL_LOG_RETENTION_DAYS)"
    return tuple(
        _removal(lineage, kind, _folder(keys.log_day_folder(log.name, lineage, day), [*infos]), reason)
        for kind, log in logs.items()
        for day, infos in groupby(
            beyond_retention(store, log, now=now, days=days), key=lambda info: keys.batch_day(info.key)
        )
    )


def look_at_lineage(store: ObjectStore, lineage: str) -> Inventory:
    """Return the inventory of a lineage."""
    adapters: dict[str, list[ObjectInfo]] = defaultdict(list)
    for info in store.list(keys.adapters_folder(lineage)):
        if file := keys.parse_adapter_file(info.key):
            adapters[file.run].append(info)
    training_rows = []
    for info in store.list(DATASETS):
        dataset = keys.parse_dataset_file(info.key)
        is_train_file = dataset is not None and dataset.lineage == lineage and dataset.name == TRAIN_FILE
        if is_train_file and not retains_training_rows(store, info.key.removesuffix(f"/{TRAIN_FILE}")):
            training_rows.append(Folder(info.key, info.size, info.modified))
    work = HomeSettings().home / "work" / lineage
    work_folders = sorted(work.iterdir()) if work.is_dir() else []
    return Inventory(
        lineage=lineage,
        versions=Versions(store).all(lineage),
        runs=RunJournal(store).all(lineage),
        adapters={key: _folder(keys.adapter_uri(lineage, key), infos) for key, infos in adapters.items()},
        work={path.name: local_folder(path) for path in work_folders if path.is_dir() and not path.is_symlink()},
        training_rows=training_rows,
        branch=Branches(store).open(lineage),
    )


def old_temporaries(store: ObjectStore, *, now: datetime) -> tuple[Removal, ...]:
    """Return what killed processes left on this machine, and their uploads to the store. It belongs to no lineage."""
    reason = "left by a process that was killed"
    uploads = [_folder(upload.key, [upload]) for upload in _old_uploads(store, now)]
    return (
        *(_removal("", "temporary files", folder, reason) for folder in find_leftovers(store, now)),
        *(_removal("", "unfinished upload", folder, reason) for folder in uploads),
    )


def _old_uploads(store: ObjectStore, now: datetime) -> list[ObjectInfo]:
    """Return the uploads that began a day ago and have not ended. Those to the inbox are other people's."""
    return [
        upload
        for upload in store.uploads()
        if upload.modified < now - AGE and not upload.key.startswith(f"{keys.INBOX}/")
    ]


def remove(store: ObjectStore, removal: Removal, now: datetime) -> None:
    """Do one removal. The files go last: after an interruption, the next plan finds the removal again.

    MLflow's copy of an adapter is removed by `tasks.mlflow_mirror`, which the note about the removal tells.
    """
    if Path(removal.address).is_absolute():
        remove_local(removal.address)
        return
    if removal.kind == "unfinished upload":
        for upload in _old_uploads(store, now):
            if upload.key == removal.address:
                store.abort_upload(upload)
        return
    if removal.version:
        note = partial(Versions(store).note_removed, removal.lineage, removal.version, f"{now:%Y-%m-%d}")
        try:
            note()
        except StoreError as error:
            if disk_full(error) is None:
                raise
            store.delete(f"{removal.address}/{WEIGHTS_FILE}")  # makes room for the note
            note()
    store.delete(removal.address)


def _folder(address: str, infos: list[ObjectInfo]) -> Folder:
    return Folder(address, sum(info.size for info in infos), max(info.modified for info in infos).astimezone(UTC))


def find_leftovers(store: ObjectStore, now: datetime) -> list[Folder]:
    """Return the temporary folders of dead processes, and the unfinished files of a folder store whose writer died."""
    places: dict[Path, Callable[[Path], bool]] = {HomeSettings().home / TEMPORARY: _is_deserted}
    if isinstance(store, FileStore):
        places[store.root / RESERVED] = is_deserted
    leftovers = []
    for place, is_left in places.items():
        for path in sorted(path for path in place.iterdir() if path.name != LOCK) if place.is_dir() else ():
            with suppress(FileNotFoundError):  # its process has just removed it
                folder = local_folder(path)
                if folder.modified < now - AGE or is_left(path):
                    leftovers.append(folder)
    return leftovers


def _is_deserted(folder: Path) -> bool:
    """Return whether a temporary folder has a lock that no process holds."""
    with suppress(OSError):  # in use, removed meanwhile, or another user's
        if (folder / LOCK).is_file():
            with FileLock(folder / LOCK, timeout=0):
                return True
    return False


def remove_local(address: str) -> None:
    """Remove a folder or a file of this machine, if it still exists."""
    path = Path(address)
    with suppress(FileNotFoundError):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def local_folder(path: Path) -> Folder:
    """Return the size and the last change of a folder or a file of this machine.

    Raises:
        FileNotFoundError: A part was removed meanwhile.
    """
    stats = [part.lstat() for part in (path, *path.rglob("*"))]
    num_bytes = sum(part.st_size for part in stats if stat.S_ISREG(part.st_mode))
    return Folder(str(path), num_bytes, datetime.fromtimestamp(max(part.st_mtime for part in stats), UTC))
