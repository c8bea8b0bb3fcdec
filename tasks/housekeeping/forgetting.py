"""Forget an arrival: find its rows and the versions that learned from them, then remove the rows."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache, partial
from itertools import chain, groupby
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, Field

from deal_core.adapter.files import METHOD_FILES, METHOD_TENSORS_FILE
from deal_core.errors import StoreError
from deal_core.shown import ACCEPTED, Shown
from infra.deleted_inputs import UnknownRows, read_deleted
from infra.lineage_state import EndedArrival, LineageState, lineages_with_state, rewrite_ended, update
from infra.predictions import answers_to, forget_answers
from infra.report.run_report import EVALUATION_FILE, LIVE_FILE
from infra.run_journal import RunJournal
from infra.store import keys
from infra.store.base import ObjectInfo, ObjectStore, temporary_folder
from infra.store.keys import TEST_FILE, TRAIN_FILE, dataset_sha256
from infra.versions import ArrivalDigests, Version, Versions
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
    local_folder,
    remove_local,
)
from tasks.lineage.frozen_rows import ANSWERS_FILE, forget_answers_to_tests, has_others, read_test_rows
from tasks.lineage.record import RECORD_FILE, LineageRecord, read_record
from tasks.lineage.tombstones import find_tombstone
from tasks.lineage.version_files import download_files, replacing
from tasks.monitoring.harvest import harvested_from
from tasks.monitoring.rows import REFERENCE_FILE, forget_reference, holds_others

Kind = Literal[
    "report",
    "rows kept by the method",
    "work folder",
    "temporary files",
    "adapter of no version",
    "rows of a job",
    "answers",
    "logged answers",
    "reference rows",
    "quarantine",
    "unfinished upload",
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

    kind: Annotated[Kind, Shown("what")]
    address: Annotated[str, Shown("where")]
    """Key in the store, or path on this machine."""
    num_bytes: Annotated[int, Shown("size", unit="bytes", words={0: "–"})] = 0
    run_key: str | None = None
    """The run of a report, whose copy in MLflow has to go too."""
    lineage: str | None = None
    version: str | None = None
    left: Mapping[str, frozenset[str]] = Field(default={}, exclude=True, repr=False)
    """Of answers and reference rows: the digests of the test rows whose answers stay, by task and slice."""


class AffectedVersion(BaseModel, frozen=True):
    """A version that learned from the arrival, directly or through an ancestor."""

    lineage: Annotated[str, Shown()]
    version: Annotated[str, Shown()]
    task: Annotated[str, Shown()]
    is_direct: Annotated[bool, Shown("how", words={True: "trained on it", False: "continues one that was"})]
    """Whether the version itself was trained on the arrival."""
    accepted: Annotated[bool, ACCEPTED]
    """Whether its gate accepted it."""
    aliases: Annotated[tuple[str, ...], Shown("alias")]


class ForgetPlan(ArrivalDigests, frozen=True):
    """What `deal data delete` removes, and which versions stay affected. Datasets of other splits are removed too."""

    held: tuple[RowsPlace, ...]
    """The places with its rows."""
    learned: tuple[AffectedVersion, ...]
    """The versions that stay."""
    unjudged: tuple[str, ...]
    """Lineages whose champion is judged on the task by these rows, and cannot be judged on it afterwards."""
    shared_with: tuple[str, ...] = ()
    """Digests of other datasets that share a landed file, for example the task's file of test rows."""
    inputs: frozenset[str] = Field(default=frozenset(), exclude=True, repr=False)
    """Digests of the inputs that are known, which name the rows of the prediction log. Earlier deletions have stored
    theirs."""
    harvested: tuple[str, ...] = ()
    """Other files in the inbox with texts of the logged answers, written by `deal feedback export`. They stay."""
    unknown: tuple[UnknownRows, ...] = ()
    """The rows whose inputs are not known."""


def affected_versions(versions: Sequence[Version], sha256s: Collection[str]) -> tuple[AffectedVersion, ...]:
    """Return the versions of a lineage, oldest first, whose weights have learned from one of the datasets."""
    affected: dict[str, AffectedVersion] = {}
    for version in versions:
        is_direct = any(arrival.dataset_sha256 in sha256s for arrival in version.trained_on)
        if is_direct or (version.parent_version in affected and not version.starts_from_base):
            affected[version.version] = AffectedVersion(
                lineage=version.lineage,
                version=version.version,
                task=version.task,
                is_direct=is_direct,
                accepted=version.accepted,
                aliases=version.aliases,
            )
    return tuple(affected.values())


def plan_forgetting(store: ObjectStore, arrival: KnownArrival) -> ForgetPlan:
    """Find every place with rows of an arrival. Nothing is changed."""
    arrival = with_every_split(store, arrival)
    inbox_files, manifests = arrival.inbox_files(store), [*manifests_of(store, arrival.task)]
    inbox_keys = [info.key for info in inbox_files]

    # A run that was killed while it stored a dataset left it without a manifest: nobody knows of which arrival it is.
    listed = {keys.dataset_sha256(info.key) for info in store.list(f"{keys.DATASETS}/{arrival.task}")}
    unnamed = listed - {sha256 for sha256, _ in manifests}
    sha256s = {*arrival.sha256s, *unnamed}

    row_files: Mapping[str, Kind] = {TRAIN_FILE: "training rows", TEST_FILE: "test rows"}
    held = [
        _file(row_files.get(name, "training rows"), info)
        for sha256 in sorted(sha256s)
        for info in store.list(keys.dataset_folder(arrival.task, sha256))
        if (name := keys.file_name(info.key)) in row_files or sha256 in unnamed  # of these the digests of rows too
    ]
    held += [  # of a killed process: no run that works on the arrival's lineages goes on when they are removed
        _file("unfinished upload", upload)
        for sha256 in sorted(sha256s)
        for upload in store.uploads(keys.dataset_folder(arrival.task, sha256))
    ]
    held += [_file("quarantine", info) for info in quarantine_of(store, arrival, sha256s)]
    held += [_file("inbox file", info) for info in inbox_files]
    held += [  # a killed process may have left rows of any arrival
        RowsPlace(kind="temporary files", address=folder.address, num_bytes=folder.num_bytes)
        for folder in find_leftovers(store, datetime.now(UTC))
    ]

    inputs, unknown = arrival_inputs(store, arrival, inbox_keys, manifests)
    # What an earlier deletion knew, it stored before it removed anything. So it is read after the rows.
    tombstone = find_tombstone(store, arrival.task, arrival.sha256s)
    if tombstone is not None:
        inputs |= read_deleted(store, arrival.task, {*arrival.sha256s, tombstone.sha256})
        unknown = [rows for rows in tombstone.unknown if rows.file in {now.file for now in unknown}]
    elif not manifests:
        unknown = []  # nobody has learned the task, so nothing of it was logged
    answer_ids: set[str] = set()
    for lineage in list_logged_lineages(store):
        if ids := answers_to(store, lineage, inputs):
            answer_ids |= ids
            address = f"{len(ids)} rows of {keys.log_folder(keys.PREDICTIONS, lineage)}"
            held.append(RowsPlace(kind="logged answers", address=address, lineage=lineage))

    learned: list[AffectedVersion] = []
    unjudged: list[str] = []
    for lineage in list_all_lineages(store):
        affected, is_unjudged, places = _look_at(store, lineage, arrival)
        learned += affected
        unjudged += [lineage] if is_unjudged else []
        held += places
    shared = {
        sha256
        for sha256, manifest in manifests
        if sha256 not in arrival.sha256s and set(manifest.files) & set(arrival.files)
    }
    return ForgetPlan(
        **arrival.model_dump(exclude={"key"}),
        held=tuple(held),
        learned=tuple(learned),
        unjudged=tuple(unjudged),
        shared_with=tuple(sorted(shared)),
        inputs=frozenset(inputs),
        harvested=tuple(key for key in harvested_from(store, answer_ids) if key not in inbox_keys),
        unknown=tuple(unknown),
    )


def _look_at(
    store: ObjectStore, lineage: str, arrival: KnownArrival
) -> tuple[tuple[AffectedVersion, ...], bool, list[RowsPlace]]:
    """Return the affected versions of a lineage, whether its champion is judged by the arrival, and the places."""
    versions, runs = Versions(store).all(lineage), RunJournal(store).all(lineage)
    digests_of_tests = cache(partial(_digests_of_tests, store))
    affected = affected_versions(versions, arrival.sha256s)
    numbers = {version.version for version in affected}
    own_runs = [run for run in runs if run.dataset_sha256 in arrival.sha256s]
    places: list[RowsPlace] = []

    # Versions that answered the arrival's test rows: those that judge them, those that they add, and slices.
    asked, is_unjudged = [], False
    for version in versions:
        if not store.exists(f"{version.adapter_uri}/{RECORD_FILE}"):
            continue
        tests = _tests_of(read_record(store, version), arrival.task)
        if not any(dataset_sha256(uri) in arrival.sha256s for uris in tests.values() for uri in uris):
            continue
        asked.append(version)
        staying = {
            name: [uri for uri in uris if dataset_sha256(uri) not in arrival.sha256s] for name, uris in tests.items()
        }
        digests = {name: frozenset(chain.from_iterable(map(digests_of_tests, uris))) for name, uris in staying.items()}
        if "champion" in version.aliases and tests.get(arrival.task):
            is_unjudged = not any(store.exists(f"{uri}/{TEST_FILE}") for uri in staying[arrival.task])
        key, number = f"{version.adapter_uri}/{REFERENCE_FILE}", version.version
        if holds_others(store, key, arrival.task, digests.get(arrival.task, ())):
            places.append(RowsPlace(kind="reference rows", address=key, lineage=lineage, version=number, left=digests))
        answers = store.find(f"{version.adapter_uri}/{ANSWERS_FILE}")
        if answers and has_others(store, version.adapter_uri, digests):
            place = _file("answers", answers, lineage=lineage, version=number)
            places.append(place.model_copy(update={"left": digests}))

    # Runs without a version that learned from the arrival or continue an affected version left folders.
    registered = {version.run_key for version in versions}
    continuing = [run for run in runs if run.parent_version in numbers]
    unfinished = {run.short_key for run in (*own_runs, *continuing) if run.run_key not in registered}
    for short_key in sorted(unfinished):
        folder = keys.adapter_uri(lineage, short_key)
        if infos := list(store.list(folder)):
            size = sum(info.size for info in infos)
            places.append(RowsPlace(kind="adapter of no version", address=folder, num_bytes=size, lineage=lineage))
    # Killed processes also left what their jobs read on other machines: test rows of any task, and kept rows.
    if any(any(store.list(f"{keys.dataset_folder(arrival.task, sha256)}/{lineage}")) for sha256 in arrival.sha256s):
        left = groupby(store.list(keys.adapters_folder(lineage)), key=lambda info: keys.job_inputs_of(info.key))
        places += [
            RowsPlace(kind="rows of a job", address=folder, num_bytes=sum(info.size for info in infos), lineage=lineage)
            for folder, infos in left
            if folder is not None and folder.split("/")[2] not in unfinished
        ]
    ended = {version.short_key for version in versions if version.version in numbers}
    for short_key in sorted({*unfinished, *ended, *(run.short_key for run in own_runs)}):
        work = work_folder(lineage, short_key)
        if work.is_dir():
            size = local_folder(work).num_bytes
            places.append(RowsPlace(kind="work folder", address=str(work), num_bytes=size, lineage=lineage))

    # Reports of these runs, and of versions that answered the test rows. The record of a removed adapter went with it,
    # so nobody knows what judged it.
    gone = [version for version in versions if version.version in numbers and version.since.adapter_removed]
    direct = [version for version in versions if version.dataset_sha256 in arrival.sha256s]
    reporting = {run.short_key: run.run_key for run in own_runs}
    reporting |= {version.short_key: version.run_key for version in (*direct, *gone, *asked)}
    for info in store.list(keys.report_folder(lineage)):
        run_key = reporting.get(keys.run_of_report(info.key))
        if run_key is not None and keys.file_name(info.key) not in FIGURES:
            places.append(_file("report", info, lineage=lineage, run_key=run_key))

    concerned = [version for version in versions if version.version in numbers and not version.since.adapter_removed]
    tensors = _method_rows(store, versions, arrival.task, arrival.sha256s) if concerned else {}
    places += [
        RowsPlace(
            kind="rows kept by the method",
            address=f"{version.adapter_uri}/{METHOD_TENSORS_FILE}",
            lineage=lineage,
            version=version.version,
        )
        for version in concerned
        if tensors[version.version]
    ]
    return affected, is_unjudged, places


def _tests_of(record: LineageRecord, task: str) -> dict[str, tuple[str, ...]]:
    """The datasets with the test rows that a version has answered, for a task and for each of its slices."""
    known = record.task(task)
    present = {} if known is None else {task: known.grown().test_uris}
    return present | {part.name: part.test_uris for part in record.slices if part.of == task}


def _digests_of_tests(store: ObjectStore, dataset_uri: str) -> frozenset[str]:
    """The digests of a dataset's test rows; none if the rows are gone or damaged."""
    try:
        return frozenset(read_test_rows(store, dataset_uri, ["sha256"]).column("sha256").to_pylist())
    except StoreError:
        return frozenset()


def _file(
    kind: Kind, info: ObjectInfo, *, lineage: str | None = None, version: str | None = None, run_key: str | None = None
) -> RowsPlace:
    return RowsPlace(
        kind=kind, address=info.key, num_bytes=info.size, lineage=lineage, version=version, run_key=run_key
    )


def forget_held(store: ObjectStore, plan: ForgetPlan) -> None:
    """Remove the rows of a plan. Each step can be repeated: the arrival is found again by its tombstone.

    Before anything is removed, an order is stored for each report: its copy in MLflow is removed by
    `tasks.mlflow_mirror`, which may not reach MLflow now.
    """
    for place in plan.held:
        if place.kind == "report":
            assert place.lineage is not None and place.run_key is not None
            store.put_bytes(keys.mlflow_forget_key(place.lineage, place.run_key), place.run_key.encode())
    emptied: set[str] = set()
    for place in sorted(plan.held, key=lambda place: ORDER.index(place.kind)):
        match place.kind:
            case "rows kept by the method":
                if place.lineage and place.lineage not in emptied:  # one call empties those of all its versions
                    _empty_method_rows(store, place.lineage, plan.task, (plan.sha256, *plan.splits))
                    emptied.add(place.lineage)
            case "work folder" | "temporary files":
                remove_local(place.address)
            case "unfinished upload":
                for upload in store.uploads(place.address.rpartition("/")[0]):
                    store.abort_upload(upload)
            case "reference rows":
                forget_reference(store, place.address, plan.task, place.left.get(plan.task, ()))
            case "answers":
                forget_answers_to_tests(store, place.address.rpartition("/")[0], place.left)
            case "logged answers":
                assert place.lineage is not None
                forget_answers(store, place.lineage, plan.inputs)
            case _:  # a file or a folder of the store
                store.delete(place.address)
    for sha256 in (*plan.splits, plan.sha256):  # the named one last: its manifest finds the others
        store.delete(keys.dataset_folder(plan.task, sha256))


def silence_notes(store: ObjectStore, landed: Collection[str], said: str) -> None:
    """Note that these files are deleted, in place of what was noted about them. A message may quote bad rows."""

    def silence(key: str, end: EndedArrival) -> EndedArrival:
        return end.model_copy(update={"outcome": "deleted", "message": said}) if key in landed else end

    def silence_open(state: LineageState) -> LineageState:
        arrivals = {
            key: note.model_copy(update={"why": said}) if key in landed and note.why else note
            for key, note in state.arrivals.items()
        }
        return state.model_copy(update={"arrivals": arrivals})

    for lineage in sorted({keys.lineage_of(info.key) for info in store.list(keys.ARRIVALS)}):
        rewrite_ended(store, lineage, silence)
    for lineage in lineages_with_state(store):
        update(store, lineage, silence_open)


def _method_rows(
    store: ObjectStore, versions: Sequence[Version], task: str, sha256s: Collection[str]
) -> dict[str, set[str]]:
    """By version, the tensors of its method state with kept rows of the task.

    A version has rows of the task's datasets if it, or a version before it, learned one of them.
    """
    from deal_core.adapter.state import kept_of_tasks
    from deal_core.strategies.kept_rows import rows_name

    wanted: dict[str, set[str]] = {}
    learned: set[str] = set()
    for version in versions:
        wanted[version.version] = set()
        if version.dataset_sha256 in sha256s or version.parent_version in learned:
            learned.add(version.version)
            with temporary_folder() as folder:
                download_files(store, version.adapter_uri, folder, METHOD_FILES)
                sizes = kept_of_tasks(folder)
            wanted[version.version] = {name for name, size in sizes.items() if size and name == rows_name(task)}
    return wanted


def _empty_method_rows(store: ObjectStore, lineage: str, task: str, sha256s: Collection[str]) -> None:
    from deal_core.adapter.state import empty_tensors

    versions = Versions(store).all(lineage)
    names = _method_rows(store, versions, task, sha256s)
    for version in versions:
        if names[version.version]:
            with temporary_folder() as folder:
                download_files(store, version.adapter_uri, folder, METHOD_FILES)
                empty_tensors(folder, names[version.version])
                with replacing(store, version, folder):
                    store.upload_folder(folder, version.adapter_uri)
