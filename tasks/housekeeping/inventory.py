"""List what `deal gc` and `deal forget` may remove: files of lineages and of killed processes.

The caller has locked the lineage.
"""

from __future__ import annotations

import json
import shutil
import stat
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

from deal_core.data.schema import is_name
from deal_core.errors import RegistryError, StoreError
from deal_core.safe_text import without_secrets
from infra.log_segments import WRITE_SECONDS, ship_all
from infra.predictions import feedback_log, feedback_without_answer, prediction_log, remove_feedback
from infra.settings import HomeSettings
from infra.store import keys
from infra.store.base import RESERVED, TEMPORARY, ObjectInfo, ObjectStore
from infra.store.keys import (
    ADAPTERS,
    DATASETS,
    FEEDBACK,
    PREDICTIONS,
    TRAIN_FILE,
)
from infra.store.local import FileStore
from infra.tracking.facts import VersionInfo
from infra.tracking.registry import Registry
from infra.tracking.runs import ArtifactRemover, list_runs
from infra.tracking.tracker import Tracker
from infra.version_log import VersionLog
from tasks.adaptation.ingest import retains_training_rows
from tasks.housekeeping.garbage import Folder, Holdings, Kind, Removal

AGE = timedelta(days=1)
"""Age at which a temporary file counts as left by a killed process."""
FEEDBACK_AGE = timedelta(days=7)
"""Age at which feedback is expected to have its answer in the store. Servers move answers there within minutes."""


def list_all_lineages(store: ObjectStore) -> tuple[str, ...]:
    """Return every lineage with an adapter or a dataset in the store, or a work folder on this machine."""
    found = {each.lineage for info in store.list(ADAPTERS) if (each := keys.parse_adapter_file(info.key))}
    datasets = [keys.parse_dataset_file(info.key) for info in store.list(DATASETS)]
    found |= {each.lineage for each in datasets if each and each.lineage}
    work = HomeSettings().home / "work"
    found |= {path.name for path in work.iterdir() if path.is_dir()} if work.is_dir() else set()
    return tuple(sorted(found))


def list_logged_lineages(store: ObjectStore) -> tuple[str, ...]:
    """Return every lineage with a prediction log or feedback, in the store or on this machine."""
    found: set[str] = set()
    for log in (PREDICTIONS, FEEDBACK):
        found |= {keys.lineage_of(info.key) for info in store.list(log)}
        folder = HomeSettings().home / log
        found |= {path.name for path in folder.iterdir() if path.is_dir()} if folder.is_dir() else set()
    return tuple(sorted(name for name in found if is_name(name)))


def ship_logs(store: ObjectStore) -> None:
    """Let the servers on this machine write the rows that wait, and move all segments of all logs into the store.

    Raises:
        StoreError: The store does not answer, or a server does not close its segment.
    """
    time.sleep(2 * WRITE_SECONDS)
    home = HomeSettings().home
    for lineage in list_logged_lineages(store):
        for log in (prediction_log(home, lineage), feedback_log(home, lineage)):
            ship_all(store, log)


def old_logs(store: ObjectStore, lineages: Iterable[str], *, now: datetime, days: int) -> tuple[Removal, ...]:
    """Return the days of the prediction logs and of the feedback that are older than the retention.

    A segment that was never moved into the store counts too. Its writer is gone, as a segment is open for minutes only.
    A segment without a name is empty; its writer was killed.
    """
    last = now.astimezone(UTC).date() - timedelta(days=days + 1)  # the youngest row of a day may be a day younger
    home, found = HomeSettings().home, list[Removal]()
    for log in (prediction_log(home, each) for each in lineages):
        for each in (log, feedback_log(home, log.lineage)):
            stored: dict[date, int] = defaultdict(int)
            for info in each.stored(store):
                stored[keys.segment_day(keys.file_name(info.key))] += info.size
            places = [(keys.log_day_folder(each.name, each.lineage, day), size) for day, size in sorted(stored.items())
                      if day <= last]  # fmt: skip
            places += [(str(path), path.stat().st_size) for path in each.segments()
                       if keys.segment_day(path.name) <= last]  # fmt: skip
            kind: Kind = "prediction log" if each is log else "feedback"
            found += [
                Removal(lineage=each.lineage, kind=kind, address=address, num_bytes=size,
                        reason=f"older than {days} days (DEAL_LOG_RETENTION_DAYS)")
                for address, size in places
            ]  # fmt: skip
            found += [
                Removal(lineage=each.lineage, kind=kind, address=folder.address, num_bytes=folder.num_bytes,
                        reason="left by a process that was killed")
                for folder in _local_folders(each.unnamed()) if folder.modified < now - AGE
            ]  # fmt: skip
    return tuple(found)


def lonely_feedback(store: ObjectStore, lineage: str, *, now: datetime) -> tuple[Removal, ...]:
    """Return the feedback on answers that the log does not have any more. Without the answer, nobody can find it.

    Raises:
        StoreError: A segment is damaged.
    """
    ids = _without_answer(store, lineage, now)
    if not ids:
        return ()
    return (Removal(lineage=lineage, kind="feedback without an answer", num_bytes=0,
                    address=f"{len(ids)} answers of {keys.log_folder(FEEDBACK, lineage)}",
                    reason="the log does not have the answers any more"),)  # fmt: skip


def _without_answer(store: ObjectStore, lineage: str, now: datetime) -> set[str]:
    return feedback_without_answer(store, HomeSettings().home, lineage, (now - FEEDBACK_AGE).timestamp())


def look_at_lineage(store: ObjectStore, registry: Registry, tracker: Tracker, lineage: str) -> Holdings:
    """Return the inventory of a lineage.

    Raises:
        RegistryError: The store has versions that the registry does not know, so the registry is the wrong one.
    """
    versions = registry.versions(lineage)
    _require_registry_of(store, registry, lineage, versions)
    adapters: dict[str, list[ObjectInfo]] = defaultdict(list)
    for info in store.list(keys.adapters_folder(lineage)):
        if each := keys.parse_adapter_file(info.key):
            adapters[each.run].append(info)
    return Holdings(
        lineage=lineage,
        versions=versions,
        runs=list_runs(tracker, lineage),
        adapters={key: _folder(keys.adapter_uri(lineage, key), infos) for key, infos in adapters.items()},
        work={path.name: local_folder(path) for path in _work_folders(lineage)},
        training_rows=_training_rows(store, lineage),
    )


def old_temporaries(store: ObjectStore, *, now: datetime) -> tuple[Removal, ...]:
    """Return the files that killed processes left on this machine. They belong to no lineage."""
    return tuple(
        Removal(lineage="", kind="temporary files", address=each.address, num_bytes=each.num_bytes,
                reason="left by a process that was killed")
        for each in find_leftovers(store, now)
    )  # fmt: skip


def with_model_bytes(removal: Removal, remover: ArtifactRemover) -> Removal:
    """Add the size of MLflow's copy of the adapter to a removal."""
    if not removal.model_id:
        return removal
    return removal.model_copy(update={"num_bytes": removal.num_bytes + remover.model_bytes(removal.model_id)})


def remove(store: ObjectStore, remover: ArtifactRemover, removal: Removal, now: datetime) -> None:
    """Do one removal. The store is last: after an interruption, the next plan finds the removal again there."""
    if Path(removal.address).is_absolute():
        remove_local(removal.address)
        return
    if removal.kind == "feedback without an answer":
        remove_feedback(store, HomeSettings().home, removal.lineage, _without_answer(store, removal.lineage, now))
        return
    if removal.version and removal.model_id:
        day = f"{now:%Y-%m-%d}"
        remover.remove_model(removal.lineage, removal.version, removal.model_id, day)
        VersionLog(store).note_removed(removal.lineage, removal.version, day)
    store.delete(removal.address)


def _require_registry_of(
    store: ObjectStore, registry: Registry, lineage: str, versions: Iterable[VersionInfo]
) -> None:
    known = {version.run_key for version in versions}
    for info in store.list(keys.ledger_folder(lineage)):
        try:
            entry = json.loads(store.get_bytes(info.key))
            run_key, version = entry["run_key"], entry["version"]
        except (ValueError, KeyError, TypeError):
            raise StoreError(f"{store.uri_of(info.key)} is damaged; restore it, or delete it, and try again.") from None
        if run_key not in known:
            raise RegistryError(
                f"The store has a ledger entry of version {version} of '{lineage}', which MLflow at "
                f"{without_secrets(registry.uri)} does not know; nothing of the lineage was removed. "
                "Check MLFLOW_TRACKING_URI and DEAL_STORE_URI; if the version was deleted in MLflow, delete "
                f"{store.uri_of(info.key)} too."
            )


def _training_rows(store: ObjectStore, lineage: str) -> list[Folder]:
    """Stored training rows of a lineage that no arrival retains."""
    found = []
    for info in store.list(DATASETS):
        file = keys.parse_dataset_file(info.key)
        is_train_file = file is not None and file.lineage == lineage and file.name == TRAIN_FILE
        if is_train_file and not retains_training_rows(store, info.key.removesuffix(f"/{TRAIN_FILE}")):
            found.append(Folder(info.key, info.size, info.modified))
    return found


def _work_folders(lineage: str) -> list[Path]:
    folder = HomeSettings().home / "work" / lineage
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if path.is_dir() and not path.is_symlink())


def _folder(address: str, infos: list[ObjectInfo]) -> Folder:
    return Folder(address, sum(info.size for info in infos), max(info.modified for info in infos).astimezone(UTC))


def find_leftovers(store: ObjectStore, now: datetime) -> list[Folder]:
    """Return old temporary folders and unfinished files of a folder store."""
    places = [HomeSettings().home / TEMPORARY]
    if isinstance(store, FileStore):
        places.append(store.root / RESERVED)
    paths = sorted(path for place in places if place.is_dir() for path in place.iterdir())
    return [folder for folder in _local_folders(paths) if folder.modified < now - AGE]


def _local_folders(paths: Iterable[Path]) -> Iterator[Folder]:
    for path in paths:
        with suppress(FileNotFoundError):  # its process has just removed it
            yield local_folder(path)


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
    stats = [each.lstat() for each in (path, *path.rglob("*"))]
    num_bytes = sum(found.st_size for found in stats if stat.S_ISREG(found.st_mode))
    return Folder(str(path), num_bytes, datetime.fromtimestamp(max(found.st_mtime for found in stats), UTC))
