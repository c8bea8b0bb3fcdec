"""Sweep: look at what there is of a lineage, and remove what a plan says. Whoever calls holds the lineage."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from deal_core.errors import RegistryError, StoreError
from deal_core.masking import without_secrets
from infra.settings import HomeSettings
from infra.store.base import ObjectInfo, ObjectStore
from infra.tracking.registry import Registry, VersionInfo
from infra.tracking.runs import ArtifactRemover, list_runs
from infra.tracking.tracking import Tracker
from infra.version_log import VersionLog
from tasks.adaptation.ingest import TRAIN_FILE, retains_training_rows
from tasks.housekeeping.garbage import Folder, Holdings, Removal
from tasks.housekeeping.leftovers import find_leftovers, local_folder, remove_local

ADAPTERS, DATASETS = "adapters", "datasets"


def list_all_lineages(store: ObjectStore) -> tuple[str, ...]:
    """Every lineage that has left something in the store or in a work folder of this machine."""
    found = {info.key.split("/")[1] for info in store.list(ADAPTERS) if info.key.count("/") >= 2}
    found |= {info.key.split("/")[3] for info in store.list(DATASETS) if info.key.count("/") == 5}
    work = HomeSettings().home / "work"
    found |= {path.name for path in work.iterdir() if path.is_dir()} if work.is_dir() else set()
    return tuple(sorted(found))


def look_at_lineage(store: ObjectStore, registry: Registry, tracker: Tracker, lineage: str) -> Holdings:
    """What there is of a lineage.

    Raises:
        RegistryError: the store tells of versions that this registry does not know, so that it is the wrong one.
    """
    versions = registry.versions(lineage)
    _require_registry_of(store, registry, lineage, versions)
    adapters: dict[str, list[ObjectInfo]] = defaultdict(list)
    for info in store.list(f"{ADAPTERS}/{lineage}"):
        adapters[info.key.split("/")[2]].append(info)
    return Holdings(
        lineage=lineage,
        versions=versions,
        runs=list_runs(tracker, lineage),
        adapters={key: _folder(f"{ADAPTERS}/{lineage}/{key}", infos) for key, infos in adapters.items()},
        work={path.name: local_folder(path) for path in _work_folders(lineage)},
        training_rows=_training_rows(store, lineage),
    )


def old_training_rows(store: ObjectStore, *, now: datetime, older_than: timedelta) -> tuple[Removal, ...]:
    """Training rows from when lineages still shared them, and nobody deleted them; once they are old."""
    return tuple(
        Removal(lineage="", kind="training rows", address=info.key, num_bytes=info.size,
                reason="learned before training rows were deleted")
        for info in store.list(DATASETS)
        if info.key.count("/") == 3 and info.key.endswith(f"/{TRAIN_FILE}") and info.modified < now - older_than
    )  # fmt: skip


def old_temporaries(store: ObjectStore, *, now: datetime) -> tuple[Removal, ...]:
    """What processes of this machine that were killed have left; no lineage owns it."""
    return tuple(
        Removal(lineage="", kind="temporary files", address=each.address, num_bytes=each.num_bytes,
                reason="left by a process that was killed")
        for each in find_leftovers(store, now)
    )  # fmt: skip


def with_model_bytes(removal: Removal, remover: ArtifactRemover) -> Removal:
    """The removal with the size of what MLflow keeps of the same adapter added."""
    if not removal.model_id:
        return removal
    return removal.model_copy(update={"num_bytes": removal.num_bytes + remover.model_bytes(removal.model_id)})


def remove(store: ObjectStore, remover: ArtifactRemover, removal: Removal, now: datetime) -> None:
    """Do one removal. The store goes last: while it has something, the next plan names the removal again."""
    if removal.kind in ("work folder", "temporary files"):
        remove_local(removal.address)
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
    for info in store.list(f"ledger/{lineage}"):
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
    """Stored training rows of a lineage that are not retained; a dataset without a manifest was never completed."""
    found = []
    for info in store.list(DATASETS):
        parts = info.key.split("/")
        is_train_file = len(parts) == 6 and parts[3] == lineage and parts[5] == TRAIN_FILE
        if is_train_file and not retains_training_rows(store, info.key.removesuffix(f"/{TRAIN_FILE}")):
            found.append(Folder(info.key, info.size, info.modified))
    return found


def _work_folders(lineage: str) -> list[Path]:
    folder = HomeSettings().home / "work" / lineage
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if path.is_dir() and not path.is_symlink())


def _folder(address: str, infos: list[ObjectInfo]) -> Folder:
    return Folder(address, sum(info.size for info in infos), max(info.modified for info in infos).astimezone(UTC))
