"""Check a landed file by its task's schema and the lineage's test rows, and store its rows as a dataset."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from prefect import task

from deal_core.config import DataConfig
from deal_core.data.dataset import ArrivalRefusedError, build_dataset
from deal_core.data.row_warnings import data_warnings
from deal_core.data.schema import DatasetManifest
from deal_core.data.source_files import digests_of
from infra.store import keys
from infra.store.base import ObjectNotFoundError, ObjectStore, temporary_folder
from infra.store.keys import INPUTS_FILE, MANIFEST_FILE, TRAIN_FILE, quarantine_folder, quarantine_key
from infra.versions import Version
from tasks.adaptation.run import STAGE
from tasks.context import current_store
from tasks.landing import choose_schema, landing_of
from tasks.lineage.datasets import read_manifest
from tasks.lineage.frozen_rows import require_tests
from tasks.lineage.record import LineageRecord
from tasks.lineage.requests import AskedFor
from tasks.lineage.tombstones import ForgottenRowsError, forgotten_tests, refuse_forgotten
from tasks.progress import advance
from tasks.references import DatasetRef
from tasks.spec import TaskSpec, reading_the_task

QUARANTINE_FILE = "quarantine.jsonl"


@task(name="ingest", **STAGE)
def ingest_arrival(
    arrival: TaskSpec,
    config: DataConfig,
    record: LineageRecord | None,
    lineage: str,
    again: bool = False,
    asked: AskedFor | None = None,
    parent: Version | None = None,
) -> DatasetRef:
    """Check an arrival and store its dataset. Bad rows go to quarantine.

    The record of the parent knows the task's labels and test rows. Each lineage has a dataset of its own, which it may
    delete. With `again`, forgotten rows are accepted. For `asked` and `parent` see
    `landing_of`.

    Raises:
        DataValidationError: The whole file is refused. The quarantine has the bad rows.
        ForgottenRowsError: The rows were forgotten.
        TaskFieldsError: The settings of the task contradict the lineage.
    """
    store = current_store()
    with reading_the_task():
        schema = choose_schema(store, arrival, record, asked=asked)
    before = record.task(arrival.name) if record else None
    brings_lost_tests = (
        before is not None and forgotten_tests(store, arrival.name, before.grown().test_uris) is not None
    )
    for known in record.tasks if record and not brings_lost_tests else ():  # fail before the training, not after it
        if known.schema.name != arrival.name:
            require_tests(store, known.grown())
    with (
        landing_of(store, arrival, schema, record, config, advance("ingest"), parent=parent, asked=asked) as landing,
        temporary_folder() as temporary,
    ):
        folder = temporary / "dataset"
        if not again:
            refuse_forgotten(store, arrival.name, digests_of(landing.sources))
            refuse_forgotten(store, arrival.name, digests_of(landing.test_sources), "test rows")
        try:
            manifest = build_dataset(landing, folder)
        except ArrivalRefusedError as error:
            # named by the digest of the first file: all datasets without a good row have the same digest
            refused = error.report.manifest
            kept = _publish_quarantine(store, folder / QUARANTINE_FILE, arrival.name, refused.files[0], refused.files)
            if kept and refused.num_training_files > 1:  # `deal data delete` may be given any of its files
                store.put_bytes(keys.refused_files_key(kept), json.dumps(refused.training_files).encode())
            if not again:
                places = [kept, keys.refused_files_key(kept)] if kept else []
                _withdraw_if_forgotten(store, arrival.name, refused.files, places)
            message = str(error).replace(str(folder / QUARANTINE_FILE), store.uri_of(kept) if kept else "")
            raise ArrivalRefusedError(message, error.report) from None
        if not again:
            refuse_forgotten(store, arrival.name, [manifest.sha256, manifest.landed_sha256])
        new_labels = schema.labels[len(before.schema.labels) :] if before else ()
        dataset = _publish(store, folder, manifest, lineage, new_labels)
        dataset = dataset.model_copy(update={"renews_tests": landing.renews_tests})
        if not again:
            digests = (dataset.sha256, dataset.landed_sha256, *manifest.files)
            places = [dataset.uri, quarantine_folder(dataset.task, dataset.sha256)]
            _withdraw_if_forgotten(store, arrival.name, digests, places)
        return dataset


def _publish(
    store: ObjectStore, folder: Path, manifest: DatasetManifest, lineage: str, new_labels: tuple[str, ...]
) -> DatasetRef:
    """Store the dataset for one lineage and one schema.

    Present test rows stay as they are: they are frozen, and equal digests do not mean equal bytes.
    """
    bad_rows = folder.with_name(QUARANTINE_FILE)
    if (folder / QUARANTINE_FILE).exists():
        (folder / QUARANTINE_FILE).rename(bad_rows)
    uri = keys.dataset_uri(manifest.task.name, manifest.sha256, lineage, manifest.task.sha256)
    try:
        before = read_manifest(store, uri)
    except ObjectNotFoundError:
        store.upload_folder(folder, uri, marker=MANIFEST_FILE)
    else:
        for name in (TRAIN_FILE, INPUTS_FILE):
            store.upload_file(folder / name, f"{uri}/{name}")
        merged = replace(
            manifest,
            retain_training_rows=manifest.retain_training_rows or before.retain_training_rows,
            files=tuple(dict.fromkeys((*before.files, *manifest.files))),
            test_sha256=before.test_sha256,
            num_training_files=before.num_training_files,
        )
        store.put_bytes(f"{uri}/{MANIFEST_FILE}", json.dumps(merged.to_json(), ensure_ascii=False, indent=2).encode())
    # The bad rows come last. If this process is killed, `deal data delete` finds what is stored by the dataset.
    quarantine = _publish_quarantine(store, bad_rows, manifest.task.name, manifest.sha256, manifest.files)
    return DatasetRef(
        task=manifest.task.name,
        uri=uri,
        sha256=manifest.sha256,
        num_train=manifest.num_train,
        num_test=manifest.num_test,
        num_added=manifest.num_added,
        num_rejected=manifest.num_rejected,
        quarantine=quarantine,
        landed_sha256=manifest.landed_sha256,
        new_labels=new_labels,
        warnings=data_warnings(manifest, include_texts=False),
    )


def _publish_quarantine(
    store: ObjectStore, rows: Path, task_name: str, sha256: str, files: Sequence[str]
) -> str | None:
    """Store the file with the bad rows of a dataset; return its key, or None without bad rows."""
    if not rows.is_file() or not rows.stat().st_size:
        return None
    key = quarantine_key(task_name, sha256, files)
    store.upload_file(rows, key)
    return key


def _withdraw_if_forgotten(store: ObjectStore, task: str, sha256s: Iterable[str], places: Sequence[str]) -> None:
    """Delete what was stored at `places` if its rows or files were forgotten meanwhile, and raise ForgottenRowsError.

    `deal data delete` writes the tombstone before it looks for rows, so one of the two processes always finds the
    other. Before the rows are stored, a tombstone may have the digests of their files alone.
    """
    try:
        refuse_forgotten(store, task, sha256s)
    except ForgottenRowsError:
        for place in places:
            store.delete(place)
        raise
