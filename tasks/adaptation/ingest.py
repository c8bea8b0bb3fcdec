"""Check a landed file by its task's schema and the lineage's test rows, store its rows, and ask the parent them."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from prefect import task

from deal_core.config import DataConfig
from deal_core.data.dataset import ArrivalRefusedError, build_dataset
from deal_core.data.row_warnings import data_warnings
from deal_core.data.schema import DatasetManifest
from deal_core.data.source_files import digests_of
from deal_core.errors import DataValidationError, StoreError
from deal_core.safe_text import listed
from infra.lineage_state import HeldByCheck
from infra.store import keys
from infra.store.base import ObjectNotFoundError, ObjectStore, temporary_folder
from infra.store.keys import INPUTS_FILE, MANIFEST_FILE, TRAIN_FILE, quarantine_folder, quarantine_key
from infra.store.opening import open_store
from infra.versions import Version, Versions, descent
from tasks.adaptation.resume import read_findings, spec_to_relearn
from tasks.adaptation.run import STAGE, AdaptationRun
from tasks.arrival_check import remark_on, score_arrival
from tasks.lineage.datasets import drop_held_rows, read_manifest, retains_training_rows
from tasks.lineage.frozen_rows import require_tests
from tasks.lineage.held import hold, is_released
from tasks.lineage.record import LineageRecord
from tasks.lineage.tombstones import ForgottenRowsError, forgotten_tests, refuse_forgotten
from tasks.notices import announce_held
from tasks.progress import advance, staged
from tasks.references import DatasetRef, ScoredArrival
from tasks.spec import AdaptSpec, TaskSpec, reading_the_task
from tasks.task_schema import choose_schema, landing_of

QUARANTINE_FILE = "quarantine.jsonl"


def _describe(dataset: DatasetRef) -> str:
    rejected = f", {dataset.num_rejected} in quarantine" if dataset.num_rejected else ""
    gained = f", new labels: {listed(dataset.new_labels)}" if dataset.new_labels else ""
    return f"{dataset.num_train} training rows, {dataset.num_test} test rows{rejected}{gained}"


def ingest(
    store: ObjectStore,
    arrival: TaskSpec,
    config: DataConfig,
    record: LineageRecord | None,
    lineage: str,
    again: bool = False,
    parent: Version | None = None,
    labels: Sequence[str] | None = None,
    renews_tests: bool | None = None,
) -> DatasetRef:
    """Check an arrival and store its dataset. Bad rows go to quarantine.

    The record of the parent knows the task's labels and test rows. Each lineage has a dataset of its own, which it may
    delete. With `again`, forgotten rows are accepted. For `parent` see `landing_of`. `labels` were added to the task by
    command, and `renews_tests` says whether it is asked for new test rows; None: as it is today.

    Raises:
        DataValidationError: The whole file is refused. The quarantine has the bad rows.
        ForgottenRowsError: The rows were forgotten.
        TaskFieldsError: The settings of the task contradict the lineage.
    """
    with reading_the_task():
        schema = choose_schema(store, arrival, record, labels=labels)
    before = record.task(arrival.name) if record else None
    brings_lost_tests = (
        before is not None and forgotten_tests(store, arrival.name, before.grown().test_uris) is not None
    )
    for known in record.tasks if record and not brings_lost_tests else ():  # fail before the training, not after it
        if known.schema.name != arrival.name:
            require_tests(store, known.grown())
    with (
        landing_of(
            store, arrival, schema, record, config, advance("ingest"), parent=parent, renews_tests=renews_tests
        ) as landing,
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


@task(name="ingest", **STAGE)
@staged("ingest", _describe)
def ingest_arrival(
    arrival: TaskSpec,
    config: DataConfig,
    record: LineageRecord | None,
    lineage: str,
    again: bool = False,
    parent: Version | None = None,
) -> DatasetRef:
    """Check a new arrival and store its dataset; see `ingest`."""
    return ingest(open_store(), arrival, config, record, lineage, again, parent)


@task(name="ingest", **STAGE)
@staged("ingest", _describe)
def ingest_again(version: Version, spec: AdaptSpec, record: LineageRecord | None, parent: Version | None) -> DatasetRef:
    """Store the arrival of a version again, with the labels and the request for test rows of its time.

    If its file is gone, its dataset of that time is returned, whose rows the store retains. It adds no test rows, since
    their texts may have been learned after another parent. `record` and `parent` are those of `ingest`.

    Raises:
        DataValidationError: A file was replaced, and the store retains no rows.
        StoreError: A file is gone, and the store retains no rows.
    """
    store, labels = open_store(), dict[str, None]()
    for earlier in reversed(descent(Versions(store).all(version.lineage), version)):
        if earlier.task == version.task and not earlier.is_consolidation:
            with suppress(StoreError):  # its findings are gone, and its labels are those of later versions too
                labels |= dict.fromkeys(read_findings(store, earlier.adapter_uri).dataset.new_labels)
    dataset = read_findings(store, version.adapter_uri).dataset
    known = record.task(version.task) if record else None
    if not needs_retained_rows(store, version, knows_task=known is not None):
        renews = dataset.renews_tests
        return ingest(store, spec.task, spec.data, record, spec.lineage, False, parent, tuple(labels), renews)
    new = [label for label in labels if known is not None and label not in known.schema.labels]
    return dataset.model_copy(update={"new_labels": tuple(new), "num_added": 0})


def needs_retained_rows(
    store: ObjectStore, version: Version, *, knows_task: bool, deleted: Collection[str] = ()
) -> bool:
    """Return whether a version's arrival can be learned again only from the rows that the store retains of it.

    `knows_task` says whether the parent knows its task. `deleted` are digests of files that are about to be deleted.

    Raises:
        DataValidationError: A file was replaced by another, and the store retains no rows.
        StoreError: A file is gone, and the store retains no rows.
    """
    dataset = read_findings(store, version.adapter_uri).dataset
    try:
        if set(spec_to_relearn(store, version)[1]) & set(deleted):
            raise DataValidationError("one of its files is deleted with the arrival; land it without that file")
    except (DataValidationError, StoreError):
        has_tests = dataset.num_test > 0 or knows_task
        has_rows = store.exists(f"{dataset.uri}/{TRAIN_FILE}") and retains_training_rows(store, dataset.uri)
        if has_tests and has_rows:
            return True
        raise
    return False


@task(name="test", **STAGE)
@staged("test", lambda tested: "no new row can be asked" if tested is None else tested.sentence)
def ask_parent(adaptation: AdaptationRun) -> ScoredArrival | None:
    """Score the version that a run continues on the rows of the run's arrival; None: no row can be asked."""
    store, spec, parent, record = open_store(), adaptation.spec, adaptation.parent, adaptation.record
    assert parent is not None and record is not None, "without a parent nobody can be asked"
    tested = score_arrival(store, spec, adaptation.dataset, parent, record, adaptation.jobs_folder)
    if tested is None or adaptation.relearns is not None:
        return tested
    released = is_released(store, spec.lineage, spec.task, adaptation.dataset)
    return tested.model_copy(update={"score": replace(tested.score, is_released=released)})


def hold_arrival(store: ObjectStore, adaptation: AdaptationRun) -> HeldByCheck:
    """Hold a run's arrival, whose labels disagree with the champion: note and announce it, and delete its rows."""
    spec, dataset, tested = adaptation.spec, adaptation.dataset, adaptation.tested
    assert tested is not None, "the champion was asked"
    noted = hold(store, spec.lineage, spec.task, dataset, remark_on(tested))
    drop_held_rows(store, spec.lineage, dataset)
    announce_held(spec.lineage, spec.task.name, noted.why, champion=tested.version, arrival=dataset.landed_sha256)
    return noted


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
