"""Forget an arrival: find its rows and the versions that learned from them, then remove the rows."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, assert_never, get_args

from pydantic import BaseModel, Field

from deal_core.adapter.files import METHOD_FILES, METHOD_TENSORS_FILE
from infra.predictions import answers_to, forget_answers
from infra.report.run_report import EVALUATION_FILE, LIVE_FILE
from infra.run_journal import Run, RunJournal
from infra.store import keys
from infra.store.base import ObjectInfo, ObjectStore, temporary_folder
from infra.store.keys import TEST_FILE, TRAIN_FILE, dataset_sha256
from infra.versions import Version, Versions
from tasks.context import work_folder
from tasks.housekeeping.arrivals import (
    KnownArrival,
    arrival_inputs,
    manifests_of,
    quarantine_of,
    with_every_split,
)
from tasks.housekeeping.garbage import (
    find_leftovers,
    list_all_lineages,
    list_logged_lineages,
    remove_local,
)
from tasks.inbox import read_state, write_state
from tasks.lineage.frozen_rows import ANSWERS_FILE
from tasks.lineage.record import RECORD_FILE, read_record
from tasks.lineage.version_files import replacing
from tasks.monitoring.harvest import harvested_from
from tasks.monitoring.rows import REFERENCE_FILE, forget_reference, holds_task

Kind = Literal[
    "report",
    "rows kept by the method",
    "work folder",
    "temporary files",
    "adapter of no version",
    "answers",
    "logged answers",
    "reference rows",
    "quarantine",
    "training rows",
    "test rows",
    "inbox file",
]
ORDER: tuple[Kind, ...] = get_args(Kind)
"""The order of removal. The rows come last: after an interruption, the arrival is found again by its rows."""
FIGURES = (EVALUATION_FILE, LIVE_FILE)
"""Files of a run's report without rows. They stay; the others may quote rows that were gained, lost or refused."""


class RowsPlace(BaseModel, frozen=True):
    """A place with rows of the arrival."""

    kind: Kind
    address: str
    """Key in the store, or path on this machine."""
    num_bytes: int = 0
    run_key: str | None = None
    """The run of a report, whose copy in MLflow has to go too."""
    lineage: str | None = None
    version: str | None = None


class AffectedVersion(BaseModel, frozen=True):
    """A version that learned from the arrival, directly or through an ancestor."""

    lineage: str
    version: str
    task: str
    is_direct: bool
    """Whether the version itself was trained on the arrival."""
    accepted: bool
    aliases: tuple[str, ...]


class ForgetPlan(BaseModel, frozen=True):
    """What `deal data delete` removes, and which versions stay affected."""

    task: str
    sha256: str
    splits: tuple[str, ...] = ()
    """Digests of other datasets with the same landed rows but another split. They are removed too."""
    landed: tuple[str, ...] = ()
    """Digests of the landed rows, without the split."""
    files: tuple[str, ...]
    held: tuple[RowsPlace, ...]
    learned: tuple[AffectedVersion, ...]
    unjudged: tuple[str, ...]
    """Lineages whose champion is judged on the task by these rows, and cannot be judged on it afterwards."""
    shared_with: tuple[str, ...] = ()
    """Digests of other datasets that share a landed file, for example the task's file of test rows."""
    inputs: frozenset[str] = Field(default=frozenset(), exclude=True, repr=False)
    """Digests of the inputs that are known, which name the rows of the prediction log."""
    harvested: tuple[str, ...] = ()
    """Other files in the inbox with texts of the logged answers, which `deal feedback export` has written. They stay."""
    knows_training_rows: bool = True
    """Whether the inputs of the training rows are known: a file of the arrival, or its training rows, are stored."""


def affected_versions(versions: Sequence[Version], sha256s: Collection[str]) -> tuple[AffectedVersion, ...]:
    """Return the versions of a lineage, oldest first, whose weights have learned from one of the datasets."""
    found: dict[str, AffectedVersion] = {}
    for version in versions:
        is_direct = version.dataset_sha256 in sha256s
        if is_direct or version.parent_version in found:
            found[version.version] = AffectedVersion(
                lineage=version.lineage,
                version=version.version,
                task=version.task,
                is_direct=is_direct,
                accepted=version.accepted,
                aliases=version.aliases,
            )
    return tuple(found.values())


def plan_forgetting(store: ObjectStore, arrival: KnownArrival) -> ForgetPlan:
    """Find every place with rows of an arrival. Nothing is changed.

    Raises:
        StoreError: The store does not answer, or a version, a journal or rows in it are damaged.
    """
    arrival = with_every_split(store, arrival)
    inbox_files, manifests = arrival.inbox_files(store), [*manifests_of(store, arrival.task)]
    inbox_keys = [info.key for info in inbox_files]
    held = [*_rows_in_store(store, arrival), *(_stored("inbox file", info) for info in inbox_files)]
    held += [  # a killed process may have left rows of any arrival
        RowsPlace(kind="temporary files", address=each.address, num_bytes=each.num_bytes)
        for each in find_leftovers(store, datetime.now(UTC))
    ]
    inputs = arrival_inputs(store, arrival, inbox_keys, manifests)
    logged = _logged(store, inputs.digests)
    held += [
        RowsPlace(
            kind="logged answers",
            lineage=lineage,
            address=f"{len(ids)} rows of {keys.log_folder(keys.PREDICTIONS, lineage)}",
        )
        for lineage, ids in logged.items()
    ]
    harvested = [key for key in harvested_from(store, set().union(*logged.values())) if key not in inbox_keys]
    learned: list[AffectedVersion] = []
    unjudged: list[str] = []
    for lineage in list_all_lineages(store):
        versions, runs = Versions(store).all(lineage), RunJournal(store).all(lineage)
        affected = affected_versions(versions, arrival.sha256s)
        learned += affected
        judged, asked = _judged_by(store, versions, arrival)
        if any("champion" in version.aliases for version in judged):
            unjudged.append(lineage)
        numbers = {each.version for each in affected}
        unfinished = _unregistered(versions, runs, numbers, arrival)
        began = {run.short_key for run in runs if run.dataset_sha256 in arrival.sha256s}
        ended = {keys.short_run(version.run_key) for version in versions if version.version in numbers}
        held += _work_folders(lineage, unfinished | began | ended)
        held += _orphans(store, lineage, unfinished)
        held += _answers(store, asked)
        held += _references(store, judged, arrival.task)
        own = {run.run_key for run in runs if run.dataset_sha256 in arrival.sha256s}
        own |= {version.run_key for version in versions if version.dataset_sha256 in arrival.sha256s}
        # the record went with the adapter, so nobody knows what judged it
        gone = {version.run_key for version in versions if version.version in numbers and version.since.adapter_removed}
        held += _reports(store, lineage, own | gone | {version.run_key for version in asked})
        held += _kept_by_method(store, versions, numbers, arrival)
    shared = {
        sha256
        for sha256, manifest in manifests
        if sha256 not in arrival.sha256s and set(manifest.files) & set(arrival.files)
    }
    return ForgetPlan(
        task=arrival.task,
        sha256=arrival.sha256,
        splits=arrival.splits,
        landed=arrival.landed,
        files=arrival.files,
        held=tuple(held),
        learned=tuple(learned),
        unjudged=tuple(unjudged),
        shared_with=tuple(sorted(shared)),
        inputs=inputs.digests,
        harvested=tuple(harvested),
        knows_training_rows=inputs.has_training_rows,
    )


def forget_held(store: ObjectStore, plan: ForgetPlan) -> None:
    """Remove the rows of a plan. Each step can be repeated: the arrival is found again by its tombstone.

    Before anything is removed, an order is stored for each report: its copy in MLflow is removed by
    `tasks.mlflow_mirror`, which may not reach MLflow now.
    """
    for each in plan.held:
        if each.kind == "report":
            assert each.lineage is not None and each.run_key is not None
            store.put_bytes(keys.mlflow_forget_key(each.lineage, each.run_key), each.run_key.encode())
    emptied: set[str] = set()
    for each in sorted(plan.held, key=lambda each: ORDER.index(each.kind)):
        match each.kind:
            case "rows kept by the method":
                if each.lineage and each.lineage not in emptied:
                    _empty_method_rows(store, each.lineage, plan.task, (plan.sha256, *plan.splits))
                    emptied.add(each.lineage)
            case "work folder":
                remove_local(each.address)
            case "reference rows":
                forget_reference(store, each.address, plan.task)
            case "temporary files":
                remove_local(each.address)
            case "logged answers":
                assert each.lineage is not None
                forget_answers(store, each.lineage, plan.inputs)
            case (
                "report"
                | "adapter of no version"
                | "answers"
                | "inbox file"
                | "quarantine"
                | "training rows"
                | "test rows"
            ):
                store.delete(each.address)
            case _:
                assert_never(each.kind)
    for sha256 in (*plan.splits, plan.sha256):  # the named one last: its manifest finds the others
        store.delete(keys.dataset_folder(plan.task, sha256))


def silence_watches(store: ObjectStore, landed: Collection[str], said: str) -> None:
    """Replace the messages of watches about these files by `said`. A message may quote bad rows."""
    for info in list(store.list(keys.WATCH)):
        lineage = keys.lineage_of_watch(info.key)
        state = read_state(store, lineage)
        files = {key: state.files[key] for key in landed if key in state.files}
        if files:
            state.files.update({key: each.model_copy(update={"message": said}) for key, each in files.items()})
            write_state(store, lineage, state)


def _stored(kind: Kind, info: ObjectInfo, version: Version | None = None) -> RowsPlace:
    """A file of the store, which may be a version's."""
    lineage, number = (version.lineage, version.version) if version else (None, None)
    return RowsPlace(kind=kind, address=info.key, num_bytes=info.size, lineage=lineage, version=number)


def _rows_in_store(store: ObjectStore, arrival: KnownArrival) -> list[RowsPlace]:
    kinds: Mapping[str, Kind] = {TRAIN_FILE: "training rows", TEST_FILE: "test rows"}
    datasets = [keys.dataset_folder(arrival.task, digest) for digest in arrival.sha256s]
    return [
        *(
            _stored(kinds[name], info)
            for folder in datasets
            for info in store.list(folder)
            if (name := keys.file_name(info.key)) in kinds
        ),
        *(_stored("quarantine", info) for info in quarantine_of(store, arrival)),
    ]


def _logged(store: ObjectStore, inputs: Collection[str]) -> dict[str, set[str]]:
    """The ids of the logged answers to the inputs, by lineage."""
    found = {lineage: answers_to(store, lineage, inputs) for lineage in list_logged_lineages(store)}
    return {lineage: ids for lineage, ids in found.items() if ids}


def _judged_by(
    store: ObjectStore, versions: Iterable[Version], arrival: KnownArrival
) -> tuple[list[Version], list[Version]]:
    """The versions that the arrival's test rows judge, and the versions that answered them, also as a slice."""
    judged, asked = [], []
    for version in versions:
        if not store.exists(f"{version.adapter_uri}/{RECORD_FILE}"):
            continue
        record = read_record(store, version.adapter_uri)
        known = record.task(arrival.task)
        slices = [each.dataset_uri for each in record.slices if each.of == arrival.task]
        is_judged = known is not None and dataset_sha256(known.dataset_uri) in arrival.sha256s
        if is_judged:
            judged.append(version)
        if is_judged or any(dataset_sha256(uri) in arrival.sha256s for uri in slices):
            asked.append(version)
    return judged, asked


def _unregistered(
    versions: Iterable[Version], runs: Iterable[Run], affected: Collection[str], arrival: KnownArrival
) -> set[str]:
    """Short keys of the runs without a version that learned from the arrival or continue an affected version."""
    registered = {version.run_key for version in versions}
    return {
        run.short_key
        for run in runs
        if run.run_key not in registered and (run.dataset_sha256 in arrival.sha256s or run.parent_version in affected)
    }


def _orphans(store: ObjectStore, lineage: str, short_keys: Collection[str]) -> list[RowsPlace]:
    folders = [keys.adapter_uri(lineage, key) for key in sorted(short_keys)]
    return [
        RowsPlace(
            kind="adapter of no version", address=folder, lineage=lineage, num_bytes=sum(info.size for info in infos)
        )
        for folder in folders
        if (infos := list(store.list(folder)))
    ]


def _work_folders(lineage: str, short_keys: Collection[str]) -> list[RowsPlace]:
    folders = [work_folder(lineage, key) for key in sorted(short_keys)]
    return [
        RowsPlace(
            kind="work folder",
            address=str(folder),
            lineage=lineage,
            num_bytes=sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        )
        for folder in folders
        if folder.is_dir()
    ]


def _answers(store: ObjectStore, versions: Iterable[Version]) -> list[RowsPlace]:
    return [
        _stored("answers", info, version)
        for version in versions
        for info in store.list(version.adapter_uri)
        if keys.file_name(info.key) == ANSWERS_FILE
    ]


def _references(store: ObjectStore, versions: Iterable[Version], task: str) -> list[RowsPlace]:
    return [
        RowsPlace(kind="reference rows", address=key, lineage=version.lineage, version=version.version)
        for version in versions
        if holds_task(store, key := f"{version.adapter_uri}/{REFERENCE_FILE}", task)
    ]


def _reports(store: ObjectStore, lineage: str, run_keys: Iterable[str]) -> list[RowsPlace]:
    by_short_key = {keys.short_run(run_key): run_key for run_key in run_keys}
    return [
        RowsPlace(
            kind="report", address=info.key, num_bytes=info.size, lineage=lineage, run_key=by_short_key[short_key]
        )
        for info in store.list(keys.report_folder(lineage))
        if (short_key := keys.run_of_report(info.key)) in by_short_key and keys.file_name(info.key) not in FIGURES
    ]


def _kept_by_method(
    store: ObjectStore, versions: Sequence[Version], affected: Collection[str], arrival: KnownArrival
) -> list[RowsPlace]:
    concerned = [version for version in versions if version.version in affected and not version.since.adapter_removed]
    names = _method_rows(store, versions, arrival.task, arrival.sha256s) if concerned else {}
    return [
        RowsPlace(
            kind="rows kept by the method",
            address=f"{version.adapter_uri}/{METHOD_TENSORS_FILE}",
            lineage=version.lineage,
            version=version.version,
        )
        for version in concerned
        if names.get(version.version)
    ]


def _method_rows(
    store: ObjectStore, versions: Sequence[Version], task: str, sha256s: Collection[str]
) -> dict[str, set[str]]:
    """By version, the tensors of its method state with rows of the task's datasets or answers to its texts.

    A version has them if it, or a version before it, learned one of the datasets.
    """
    from deal_core.adapter.method_state import STORED_ROWS
    from deal_core.adapter.state import kept_of_tasks
    from deal_core.strategies.own_texts import answers_name

    sizes: dict[str, dict[str, int]] = {}
    wanted: dict[str, set[str]] = {}
    learned: set[str] = set()
    for version in versions:
        parent = version.parent_version or ""
        with temporary_folder() as folder:
            _download_method(store, version.adapter_uri, folder)
            names = sizes.setdefault(version.version, kept_of_tasks(folder)).keys()
        found = wanted.get(parent, set()) & names
        if version.dataset_sha256 in sha256s:
            found |= {name for name in names - sizes.get(parent, {}).keys() if name.startswith(STORED_ROWS)}
        if version.dataset_sha256 in sha256s or parent in learned:
            learned.add(version.version)
            found |= {name for name in names if name.startswith(answers_name(task))}
        wanted[version.version] = found
    return {version: {name for name in names if sizes[version][name]} for version, names in wanted.items()}


def _empty_method_rows(store: ObjectStore, lineage: str, task: str, sha256s: Collection[str]) -> None:
    from deal_core.adapter.state import empty_tensors

    versions = Versions(store).all(lineage)
    names = _method_rows(store, versions, task, sha256s)
    for version in [version for version in versions if names[version.version]]:
        with temporary_folder() as folder:
            _download_method(store, version.adapter_uri, folder)
            empty_tensors(folder, names[version.version])
            with replacing(store, version, folder):
                store.upload_folder(folder, version.adapter_uri)


def _download_method(store: ObjectStore, adapter_uri: str, folder: Path) -> None:
    for info in store.list(adapter_uri):
        if keys.file_name(info.key) in METHOD_FILES:
            store.download_file(info.key, folder / keys.file_name(info.key))
