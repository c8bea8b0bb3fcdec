"""Check a landed file by its task's schema and the lineage's test rows, and store its rows as a dataset.

Commands that only check a file import this module too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from deal_core.config import DataConfig
from deal_core.data.dataset import ArrivalRefusedError, Landing, build_dataset
from deal_core.data.row_warnings import data_warnings
from deal_core.data.rows import stored_input_digest
from deal_core.data.schema import DatasetManifest, TaskSchema, label_key
from deal_core.data.source_files import digests_of
from deal_core.errors import ConfigError
from deal_core.evaluation.answer_scores import require_metric
from deal_core.safe_text import brief
from infra.store import keys
from infra.store.base import ObjectNotFoundError, ObjectStore, temporary_folder
from infra.store.keys import MANIFEST_FILE, TRAIN_FILE, quarantine_folder, quarantine_key
from tasks.adaptation.frozen_rows import read_test_rows, require_unaltered
from tasks.adaptation.manifests import read_manifest
from tasks.context import current_store
from tasks.data_files import local_files
from tasks.lineage.record import KnownTask, LineageRecord
from tasks.lineage.requests import added_labels, is_renewal_asked
from tasks.lineage.tombstones import ForgottenRowsError, forgotten_tests, refuse_forgotten, require_test_rows
from tasks.progress import advance
from tasks.references import Arrival, DatasetRef
from tasks.spec import reading_the_task

QUARANTINE_FILE = "quarantine.jsonl"
OF_NEW_TASKS = {"format": "auto", "metric": "auto", "assistant_turns": "all"}
"""Fields of a task that the lineage does not know; the settings of its first arrival come before them."""


@contextmanager
def landing_of(
    store: ObjectStore,
    arrival: Arrival,
    schema: TaskSchema,
    record: LineageRecord | None,
    config: DataConfig,
    on_progress: Callable[[int], None] | None = None,
) -> Iterator[Landing]:
    """Yield the arrival's files on this machine, with all that its rows are checked by.

    Raises:
        DataValidationError: There is no such file.
        StoreError: The lineage's test rows are damaged.
    """
    known = record.task(arrival.task) if record else None
    with (
        local_files(store, arrival.data) as sources,
        local_files(store, arrival.test_data or ()) as test_sources,
    ):
        yield Landing(
            sources=sources,
            task=schema,
            config=config,
            test_sources=test_sources,
            frozen_test_inputs=_frozen_test_inputs(store, record, arrival.task),
            renews_tests=bool(record and known and is_renewal_asked(store, record.lineage, known)),
            on_progress=on_progress,
            new_label_remedy=_new_label_remedy(arrival, record),
        )


def _new_label_remedy(arrival: Arrival, record: LineageRecord | None) -> str:
    if record is None or record.task(arrival.task) is None:
        return "A label that is new is added to the task's labels: task.labels in the spec or the task file."
    return f"A label that is new is added with: deal labels {arrival.task} --add LABEL --lineage {record.lineage}."


def choose_schema(store: ObjectStore, arrival: Arrival, record: LineageRecord | None) -> TaskSchema:
    """Return the schema of the user's settings, or else the lineage's schema, or else one that the file completes.

    A known task also has the labels that were added by command. The user may still give the labels without them.

    Raises:
        ConfigError: The settings contradict the lineage.
    """
    for schema in [known.schema for known in record.tasks] if record else []:
        require_metric(schema.metric)  # rather now than after the training
    if (metric := arrival.given.get("metric")) is not None:
        require_metric(metric)
    known = record.task(arrival.task) if record else None
    if record is not None and any(each.name == arrival.task for each in record.slices):
        raise ConfigError(
            f"'{arrival.task}' names earlier test rows in lineage '{record.lineage}'; give the task another name."
        )
    if record is None or known is None:
        given = _schema_fields(arrival.given, ())
        return TaskSchema(name=arrival.task, **{**OF_NEW_TASKS, **given})
    added = added_labels(store, record.lineage, arrival.task) if known.schema.labels else ()
    widened = known.schema.with_labels(added)
    asked = replace(known.schema, **_schema_fields(arrival.given, widened.labels)).with_labels(added)
    for name in ("format", "labels", "instruction", "template", "prompt", "metric"):
        given, learned = getattr(asked, name), getattr(widened, name)
        if given != learned:
            adding = f"deal labels {arrival.task} --add LABEL --lineage {record.lineage}"
            remedy = f"add labels with: {adding}, or start" if name == "labels" else "or start"
            raise ConfigError(
                f"task.{name} of '{arrival.task}' is {brief(given)}, but the lineage learned it as {brief(learned)}; "
                f"leave it out, {remedy} a new lineage."
            )
    return asked


def _schema_fields(given: Mapping[str, Any], known: Sequence[str]) -> dict[str, Any]:
    """Fields of a TaskSchema of the user's settings. A mapping of labels keeps the order of the known labels."""
    names = given.get("labels")
    if not isinstance(names, Mapping):
        return dict(given)
    keys = {label_key(label) for label in known}
    are_known = keys.issuperset(label_key(name) for name in names.values())
    labels = tuple(known) if are_known else tuple(dict.fromkeys(names.values()))
    return {**given, "labels": labels, "label_names": dict(names)}


def _frozen_test_inputs(store: ObjectStore, record: LineageRecord | None, task_name: str) -> Collection[bytes]:
    """Return the digests of the task's frozen test texts, and of its test texts from before a renewal.

    The result is empty for a new task and for a task whose test rows were forgotten: the arrival brings the test rows.
    """
    known = record.task(task_name) if record else None
    if record is None or known is None or forgotten_tests(store, task_name, known.dataset_uri):
        return ()
    datasets = [known.dataset_uri, *(each.dataset_uri for each in record.slices if each.of == task_name)]
    inputs = [
        text
        for uri in datasets
        if not forgotten_tests(store, task_name, uri)
        for text in read_test_rows(store, uri, ["input"]).column("input").to_pylist()
    ]
    assert known.schema.format != "auto", "a task that was learned has a format"
    kind = known.schema.format
    return frozenset(stored_input_digest(kind, stored) for stored in inputs)


def ingest_arrival(
    arrival: Arrival, config: DataConfig, record: LineageRecord | None, lineage: str, again: bool = False
) -> DatasetRef:
    """Check an arrival and store its dataset. Bad rows go to quarantine.

    The parent's record knows the task's labels and test rows. Each lineage has a dataset of its own, which it may
    delete. With `again`, forgotten rows are accepted.

    Raises:
        DataValidationError: The whole file is refused. The quarantine has the bad rows.
        ForgottenRowsError: The rows were forgotten.
        TaskFieldsError: The settings of the task contradict the lineage.
    """
    store = current_store()
    with reading_the_task():
        schema = choose_schema(store, arrival, record)
    before = record.task(arrival.task) if record else None
    brings_lost_tests = before is not None and forgotten_tests(store, arrival.task, before.dataset_uri) is not None
    for known in record.tasks if record and not brings_lost_tests else ():  # fail before the training, not after it
        if known.schema.name != arrival.task:
            require_test_rows(store, known.schema.name, known.dataset_uri)
            require_unaltered(store, known.dataset_uri)
    with (
        landing_of(store, arrival, schema, record, config, advance("ingest")) as landing,
        temporary_folder() as temporary,
    ):
        folder = temporary / "dataset"
        if not again:
            refuse_forgotten(store, arrival.task, digests_of(landing.sources))
            refuse_forgotten(store, arrival.task, digests_of(landing.test_sources), "test rows")
        try:
            manifest = build_dataset(landing, folder)
        except ArrivalRefusedError as error:
            # named by the digest of the first file: all datasets without a good row have the same digest
            refused = error.report.manifest
            kept = _publish_quarantine(store, folder, arrival.task, refused.files[0], refused.files)
            if kept and refused.num_training_files > 1:  # `deal forget` may be given any of its files
                store.put_bytes(keys.refused_files_key(kept), json.dumps(refused.training_files).encode())
            if not again:
                places = [kept, keys.refused_files_key(kept)] if kept else []
                _withdraw_if_forgotten(store, arrival.task, refused.files, places)
            message = str(error).replace(str(folder / QUARANTINE_FILE), store.uri_of(kept) if kept else "")
            raise ArrivalRefusedError(message, error.report) from None
        if not again:
            refuse_forgotten_rows(store, arrival.task, manifest)
        new_labels = schema.labels[len(before.schema.labels) :] if before else ()
        dataset = _publish(store, folder, manifest, lineage, new_labels)
        dataset = dataset.model_copy(update={"renews_tests": landing.renews_tests})
        if not again:
            digests = (dataset.sha256, dataset.landed_sha256, *manifest.files)
            places = [dataset.uri, quarantine_folder(dataset.task, dataset.sha256)]
            _withdraw_if_forgotten(store, arrival.task, digests, places)
        return dataset


def _publish(
    store: ObjectStore, folder: Path, manifest: DatasetManifest, lineage: str, new_labels: tuple[str, ...]
) -> DatasetRef:
    """Store the dataset for one lineage and one schema.

    Present test rows stay as they are: they are frozen, and equal digests do not mean equal bytes.
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
            test_sha256=before.test_sha256,
            num_training_files=before.num_training_files,
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
        warnings=data_warnings(manifest.task, manifest.contradictions, include_texts=False),
    )


def _publish_quarantine(
    store: ObjectStore, folder: Path, task_name: str, sha256: str, files: Sequence[str]
) -> str | None:
    """Move the bad rows from the dataset's folder to the store; return their key, or None without bad rows."""
    rows = folder / QUARANTINE_FILE
    key = quarantine_key(task_name, sha256, files) if rows.is_file() and rows.stat().st_size else None
    if key is not None:
        store.upload_file(rows, key)
    rows.unlink(missing_ok=True)
    return key


def _withdraw_if_forgotten(store: ObjectStore, task: str, sha256s: Iterable[str], places: Sequence[str]) -> None:
    """Delete what was stored at `places` if its rows or files were forgotten meanwhile, and raise ForgottenRowsError.

    `deal forget` writes the tombstone before it looks for rows, so one of the two processes always finds the other.
    Before the rows are stored, a tombstone may have the digests of their files alone.
    """
    try:
        refuse_forgotten(store, task, sha256s)
    except ForgottenRowsError:
        for place in places:
            store.delete(place)
        raise


def refuse_forgotten_rows(store: ObjectStore, task: str, rows: DatasetManifest | DatasetRef) -> None:
    """Raise ForgottenRowsError if the rows have a tombstone: with this split, or as they landed."""
    refuse_forgotten(store, task, [rows.sha256, rows.landed_sha256])


def drop_training_rows(store: ObjectStore, dataset_uri: str) -> None:
    """Delete the training rows of a learned dataset, unless the arrival retains them. The call can be repeated.

    No later run needs these rows: each run reads its own file.
    """
    if not retains_training_rows(store, dataset_uri):
        store.delete(f"{dataset_uri}/{TRAIN_FILE}")


def retains_training_rows(store: ObjectStore, dataset_uri: str) -> bool:
    """Return whether a dataset retains its training rows. A dataset without a manifest is incomplete or forgotten."""
    try:
        return read_manifest(store, dataset_uri).retain_training_rows
    except ObjectNotFoundError:
        return False


def new_task(store: ObjectStore, dataset: DatasetRef, max_prompt_tokens: int, max_new_tokens: int) -> KnownTask:
    """Return the task of a dataset whose test rows judge it from now on."""
    return KnownTask(
        schema=read_manifest(store, dataset.uri).task,
        dataset_uri=dataset.uri,
        num_test=dataset.num_test,
        max_prompt_tokens=max_prompt_tokens,
        max_new_tokens=max_new_tokens,
    )


def tasks_after(
    store: ObjectStore,
    before: LineageRecord | None,
    dataset: DatasetRef,
    renewed: KnownTask | None,
    max_prompt_tokens: int,
    max_new_tokens: int,
) -> tuple[KnownTask, ...]:
    """Return the tasks that a version knows after it learned the dataset, each with the test rows that judge it.

    The limits are those of a new task. `renewed` is the task whose test rows the dataset's replace.
    """
    known = before.tasks if before else ()
    if before is None or before.task(dataset.task) is None:
        known = (*known, new_task(store, dataset, max_prompt_tokens, max_new_tokens))
    known = tuple(task.judged_by(dataset) if task == renewed else task for task in known)
    return tuple(replace(task, schema=dataset.widen(task.schema)) for task in known)
