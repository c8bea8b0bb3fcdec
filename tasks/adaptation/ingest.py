"""Ingest: a landed file becomes a validated, content-addressed dataset in the store."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
from prefect import task
from prefect.cache_policies import NO_CACHE

from deal_core.config import DataConfig
from deal_core.data.reading.lines import sha256_of_input
from deal_core.data.rows import stored_input_digest
from deal_core.data.schema import DatasetManifest, TaskSchema
from deal_core.data.validate import ArrivalRefusedError, build_dataset
from deal_core.errors import ConfigError, DataValidationError
from deal_core.printable import brief
from infra.store import keys
from infra.store.base import ObjectNotFoundError, ObjectStore, temporary_folder
from infra.store.keys import MANIFEST_FILE, TEST_FILE, TRAIN_FILE, quarantine_folder, quarantine_key
from tasks.context import current_store, local_file
from tasks.lineage.labels import added_labels
from tasks.lineage.record import LineageRecord, read_record
from tasks.lineage.tombstones import ForgottenRowsError, forgotten_tests, refuse_forgotten, require_test_rows
from tasks.lineage.version_files import reading_stored
from tasks.progress import advance
from tasks.references import Arrival, DatasetRef, VersionRef

QUARANTINE_FILE = "quarantine.jsonl"


class TaskFieldsError(ConfigError, DataValidationError):
    """What is said of an arrival's task is wrong in itself, or the lineage learned it otherwise."""


@contextmanager
def reading_the_task() -> Iterator[None]:
    """Whatever does not fit inside is said of the arrival's task: no later try can make it fit.

    Raises:
        TaskFieldsError: in place of a ConfigError, which elsewhere is about the lineage or the machine.
    """
    try:
        yield
    except ConfigError as error:
        raise TaskFieldsError(str(error)) from None


@task(name="ingest", cache_policy=NO_CACHE)
def ingest_arrival(
    arrival: Arrival, config: DataConfig, parent: VersionRef | None, lineage: str, again: bool = False
) -> DatasetRef:
    """Validate an arrival and put its dataset into the store; bad rows go to quarantine.

    Args:
        arrival: the file, and what is said of its task.
        config: how it is checked and split.
        parent: the version that knows the task's labels and test rows.
        lineage: whose dataset it becomes; lineages that learn the same rows do not share what one of them may delete.
        again: also where these rows were forgotten.

    Raises:
        DataValidationError: the file is refused whole; what is wrong with it lies in quarantine.
        ForgottenRowsError: somebody had the rows forgotten.
        TaskFieldsError: the user says other things of the task than the lineage knows.
    """
    store = current_store()
    record = read_record(store, parent.adapter_uri) if parent else None
    with reading_the_task():
        schema = choose_schema(store, arrival, record)
    for known in record.tasks if record else ():  # said now rather than after the training
        if known.schema.name != arrival.task:
            require_test_rows(store, known.schema.name, known.dataset_uri)
    with (
        local_file(store, arrival.data) as source,
        local_file(store, arrival.test_data) if arrival.test_data else nullcontext() as test_source,
        temporary_folder() as temporary,
    ):
        folder = temporary / "dataset"
        if not again:
            refuse_forgotten(store, arrival.task, [sha256_of_input(source)])
            if test_source is not None:
                refuse_forgotten(store, arrival.task, [sha256_of_input(test_source)], "test rows")
        try:
            manifest = build_dataset(
                source,
                schema,
                folder,
                config,
                test_source=test_source,
                frozen_test_inputs=frozen_test_inputs(store, record, arrival.task),
                on_progress=advance("ingest"),
            )
        except ArrivalRefusedError as error:
            # by the file: of one without a good row the dataset is empty, and all such have one digest
            files = error.report.manifest.files
            kept = _publish_quarantine(store, folder, arrival.task, files[0], files)
            message = str(error).replace(str(folder / QUARANTINE_FILE), store.uri_of(kept) if kept else "")
            raise ArrivalRefusedError(message, error.report) from None
        if not again:
            refuse_forgotten(store, arrival.task, _digests_of(manifest))
        before = record.task(arrival.task) if record else None
        new_labels = schema.labels[len(before.schema.labels) :] if before else ()
        dataset = _publish(store, folder, manifest, lineage, new_labels)
        if not again:
            _withdraw_forgotten(store, dataset)
        return dataset


def choose_schema(store: ObjectStore, arrival: Arrival, record: LineageRecord | None) -> TaskSchema:
    """What the user says of the task, else what the lineage knows of it, else what the file will show.

    A task that the lineage knows has the labels too that it has gained by command. Who names the labels of before says
    nothing against them.

    Raises:
        ConfigError: the lineage knows the task otherwise.
    """
    known = record.task(arrival.task) if record else None
    if record is None or known is None:
        return TaskSchema(name=arrival.task, **{"format": "auto", **arrival.given})
    added = added_labels(store, record.lineage, arrival.task) if known.schema.labels else ()
    asked, widened = replace(known.schema, **arrival.given).with_labels(added), known.schema.with_labels(added)
    for name in ("format", "labels", "instruction", "template"):
        said, stands = getattr(asked, name), getattr(widened, name)
        if said != stands:
            adding = f"deal labels {arrival.task} --add LABEL --lineage {record.lineage}"
            remedy = f"add labels with: {adding}, or start" if name == "labels" else "or start"
            raise ConfigError(
                f"task.{name} of '{arrival.task}' is {brief(said)}, but the lineage learned it as "
                f"{brief(stands)}; leave it out, "
                f"{remedy} a new lineage."
            )
    return asked


def frozen_test_inputs(store: ObjectStore, record: LineageRecord | None, task_name: str) -> Collection[bytes]:
    """Digests of the texts that judge the task for good; none where the arrival has to bring them.

    That is the task's first one, and one after its test rows were forgotten.
    """
    known = record.task(task_name) if record else None
    if known is None or forgotten_tests(store, task_name, known.dataset_uri):
        return ()
    with temporary_folder() as temporary:
        path = temporary / TEST_FILE
        store.download_file(f"{known.dataset_uri}/{TEST_FILE}", path)
        inputs = pq.read_table(path, columns=["input"]).column("input").to_pylist()
    assert known.schema.format != "auto", "a task that was learned has a format"
    kind = known.schema.format
    return frozenset(stored_input_digest(kind, stored) for stored in inputs)


def _publish(
    store: ObjectStore, folder: Path, manifest: DatasetManifest, lineage: str, new_labels: tuple[str, ...]
) -> DatasetRef:
    """Put the dataset where it belongs to one lineage and one way of asking.

    Test rows that are there stay to the byte: they judge the task for good, and a digest is blind to blanks.
    """
    quarantine = _publish_quarantine(store, folder, manifest.task.name, manifest.sha256, manifest.files)
    uri = keys.dataset_uri(manifest.task.name, manifest.sha256, lineage, manifest.task.sha256)
    try:
        before = read_manifest(store, uri)
    except ObjectNotFoundError:
        store.upload_folder(folder, uri, marker=MANIFEST_FILE)
    else:
        store.upload_file(folder / TRAIN_FILE, f"{uri}/{TRAIN_FILE}")
        merged = replace(
            manifest,
            retain_training_rows=manifest.retain_training_rows or before.retain_training_rows,
            files=tuple(dict.fromkeys((*before.files, *manifest.files))),
        )
        store.put_bytes(f"{uri}/{MANIFEST_FILE}", json.dumps(merged.to_json(), ensure_ascii=False, indent=2).encode())
    return DatasetRef(
        task=manifest.task.name,
        uri=uri,
        sha256=manifest.sha256,
        num_train=manifest.num_train,
        num_test=manifest.num_test,
        num_rejected=manifest.num_rejected,
        quarantine=quarantine,
        landed_sha256=manifest.landed_sha256,
        new_labels=new_labels,
    )


def _publish_quarantine(
    store: ObjectStore, folder: Path, task_name: str, sha256: str, files: Sequence[str]
) -> str | None:
    """Move the bad rows out of the dataset's folder into the store; return their key, None if there are none."""
    rows = folder / QUARANTINE_FILE
    key = quarantine_key(task_name, sha256, files) if rows.is_file() and rows.stat().st_size else None
    if key is not None:
        store.upload_file(rows, key)
    rows.unlink(missing_ok=True)
    return key


def _withdraw_forgotten(store: ObjectStore, dataset: DatasetRef) -> None:
    """Whoever forgets these rows meanwhile wrote the tombstone before looking for rows: one of the two sees the other.

    Raises:
        ForgottenRowsError: they were forgotten while they were stored.
    """
    try:
        refuse_forgotten(store, dataset.task, _digests_of(dataset))
    except ForgottenRowsError:
        store.delete(dataset.uri)
        store.delete(quarantine_folder(dataset.task, dataset.sha256))
        raise


def _digests_of(rows: DatasetManifest | DatasetRef) -> list[str]:
    """What a tombstone of these rows lies under: as they are split here, and as they landed."""
    return [digest for digest in (rows.sha256, rows.landed_sha256) if digest]


def drop_training_rows(store: ObjectStore, dataset_uri: str) -> None:
    """Delete the training rows of a dataset that is learned, unless its arrival asked to retain them.

    A run never needs what an earlier one left: it reads its file anew. Can be repeated.
    """
    if not retains_training_rows(store, dataset_uri):
        store.delete(f"{dataset_uri}/{TRAIN_FILE}")


def retains_training_rows(store: ObjectStore, dataset_uri: str) -> bool:
    """Whether a dataset's arrival asked to retain its training rows; not where there is no manifest.

    Such a dataset was forgotten, or never completed.
    """
    try:
        return read_manifest(store, dataset_uri).retain_training_rows
    except ObjectNotFoundError:
        return False


def read_manifest(store: ObjectStore, dataset_uri: str) -> DatasetManifest:
    """The manifest of a dataset in the store.

    Raises:
        ObjectNotFoundError: it is missing.
        StoreError: it is damaged, or of another schema version.
    """
    key = f"{dataset_uri}/{MANIFEST_FILE}"
    remedy = "Restore it from a backup of the store. Versions that learned the dataset still predict and serve."
    with reading_stored(store, key, "the record of a dataset", remedy):
        return DatasetManifest.from_json(json.loads(store.get_bytes(key)))
