"""What MLflow has of a lineage, by the note that the last synchronisation left in the store. MLflow is not asked.

`tasks.mlflow_mirror` writes into MLflow, and the note. Who only reads what is missing imports this module alone.
"""

from __future__ import annotations

from collections.abc import Collection

from infra.promotions import PromotionLog
from infra.run_journal import Run, RunJournal
from infra.store import keys
from infra.store.base import ObjectStore
from infra.store.stored import Stored, read_stored, write_stored
from infra.versions import Versions


class Mirrored(Stored):
    """The note about what MLflow has of a lineage."""

    written: tuple[str, ...] = ()
    """Entries as `entries_of` names them."""


def waiting(store: ObjectStore, lineage: str) -> tuple[str, ...]:
    """Return what MLflow lacks of a lineage.

    Example:
        `("version 3", "move 4")`
    """
    written = read_note(store, lineage)
    return tuple(entry for entry in entries_of(store, lineage) if entry not in written)


def entries_of(store: ObjectStore, lineage: str) -> list[str]:
    """Return the names of everything that MLflow is to have of a lineage, in the order in which it is written."""
    versions = Versions(store).all(lineage)
    runs = {run.run_key: run for run in RunJournal(store).all(lineage)}
    registered = {version.run_key for version in versions}
    failed = [run for run in runs.values() if run.state == "failed" and run.run_key not in registered]
    reported = [version for version in versions if is_over(runs.get(version.run_key))]
    last = PromotionLog(store).last(lineage)
    orders = [
        keys.file_name(info.key).removesuffix(".forget") for info in store.list(keys.mlflow_forget_folder(lineage))
    ]
    return [
        *(f"forget {run}" for run in orders),
        *(f"failed run {run.short_key}" for run in failed),
        *(f"version {version.version}" for version in versions),
        *(f"report {version.version}" for version in reported),
        *(f"removal of adapter {version.version}" for version in versions if version.since.adapter_removed),
        *([f"move {last.number}"] if last else ()),
    ]


def is_over(run: Run | None) -> bool:
    """Return whether a run that has registered a version has written its report, or never will."""
    return run is None or run.state != "running"


def read_note(store: ObjectStore, lineage: str) -> frozenset[str]:
    """Return the names of the entries that MLflow has; raise StoreError if the note is damaged."""
    note = read_stored(
        store,
        keys.mlflow_key(lineage),
        Mirrored,
        what="the note about what MLflow has",
        remedy="Delete it: everything is looked for in MLflow again.",
    )
    return frozenset(note.written if note else ())


def write_note(store: ObjectStore, lineage: str, written: Collection[str]) -> None:
    """Note which of the lineage's entries MLflow has."""
    entries = tuple(entry for entry in entries_of(store, lineage) if entry in written)
    write_stored(store, keys.mlflow_key(lineage), Mirrored(written=entries))
