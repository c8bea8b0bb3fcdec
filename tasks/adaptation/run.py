"""A run: its identity, its entry in the journal, what was learned before, and what its stages share."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from prefect import runtime
from prefect.cache_policies import NO_CACHE

from deal_core.config import AdapterConfig, Quantize
from deal_core.data.schema import TaskSchema
from deal_core.errors import DataValidationError
from infra.run_journal import Run, RunJournal
from infra.store import keys
from infra.store.base import ObjectStore
from infra.store.format import write_format
from infra.versions import Version, Versions
from tasks.base import lend_base, load
from tasks.context import current_store, work_folder
from tasks.lineage.choices import settings_of
from tasks.lineage.consolidation import ConsolidationPlan
from tasks.lineage.datasets import read_manifest
from tasks.lineage.frozen_rows import KeptAnswers, parts_left, read_answers
from tasks.lineage.record import FrozenRows, KnownTask, LineageRecord, choose_task
from tasks.lineage.requests import AskedFor, Renewal, find_renewal
from tasks.lineage.version_files import fetch_adapter
from tasks.progress import Interrupted
from tasks.references import BaseRef, DatasetRef, ScoredArrival
from tasks.spec import AdaptSpec

RETRY_SECONDS = [5, 30, 120]
"""Pauses before a stage is tried again."""
TRANSIENT = {
    "builtins": {"ConnectionError", "ConnectionResetError", "ConnectionRefusedError", "ConnectionAbortedError"}
    | {"BrokenPipeError", "TimeoutError"},
    "httpx": {"ConnectError", "ReadError", "WriteError", "RemoteProtocolError", "PoolTimeout"}
    | {"ConnectTimeout", "ReadTimeout", "WriteTimeout"},
    "requests": {"ConnectionError", "ConnectTimeout", "ReadTimeout", "Timeout", "ChunkedEncodingError"},
    "botocore": {"EndpointConnectionError", "ConnectionClosedError", "ConnectTimeoutError", "ReadTimeoutError"}
    | {"ConnectionError", "HTTPClientError"},
}
"""Errors of a connection by the package that raises them: Prefect, MLflow, the store and the Hub use these clients."""


def is_transient(error: BaseException | None) -> bool:
    """Return whether an error, or what caused it, is one of a connection. A mistake in the data never is one."""
    while error is not None:
        if isinstance(error, DataValidationError | Interrupted):
            return False
        kind = type(error)
        if kind.__name__ in TRANSIENT.get(kind.__module__.partition(".")[0], ()):
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


STAGE: dict[str, Any] = {
    "tags": ["deal"],
    "cache_policy": NO_CACHE,
    "retries": len(RETRY_SECONDS),
    "retry_delay_seconds": RETRY_SECONDS,
    # Prefect asks after a failure; the state has the error
    "retry_condition_fn": lambda task, run, state: isinstance(state.data, BaseException) and is_transient(state.data),
}
"""Options of every stage. Prefect's cache is not used: a run finds its own results by its key and goes on from them."""


@dataclass(frozen=True, kw_only=True)
class Remake:
    """A step of a branch: the arrival of a version is learned again, and the champion stays; see `infra.branches`."""

    branch: int
    version: str
    """The version whose arrival is learned again."""
    parent: Version | None
    """The version that the new one continues; None: it starts from the base model."""
    asked: AskedFor
    dataset: DatasetRef | None = None
    """The dataset with the rows that the store retains; None: the arrival's file is read."""


@dataclass(frozen=True, kw_only=True)
class RunInputs:
    """What a run starts from: its arrival, its parent, and what its spec and its lineage choose."""

    spec: AdaptSpec
    dataset: DatasetRef
    base: BaseRef
    adapter: AdapterConfig
    """Shape of the lineage's adapter."""
    strategy: str
    parent: Version | None
    """The version that the new one continues, the champion unless a branch is made; None: it starts from the base
    model, and has no record."""
    record: LineageRecord | None
    attempt: int
    """Number of versions that were trained on the dataset before, if it is to be trained again."""
    requeued_sha256: str | None
    """Digest of the dataset of the version whose arrival is learned again; None: no version is replaced."""
    consolidation: ConsolidationPlan | None = None
    """What is learned together; None: one arrival is learned. Then `dataset` stands for all of its rows."""
    remake: Remake | None = None
    """The step of a branch; None: the version continues the champion."""
    tested: ScoredArrival | None = None
    """What the version before scored on the arrival's rows; None: it was not asked."""

    @property
    def lineage(self) -> str:
        """The lineage that learns."""
        return self.spec.lineage

    @property
    def config_sha256(self) -> str:
        """Digest of all settings that can change the result."""
        return self.spec.config_sha256(self.adapter, self.strategy)

    @property
    def run_key(self) -> str:
        """The run's identity. The same arrival, parent and settings give the same key."""
        dataset, origin = self.dataset, self.parent.version if self.parent else "base"
        parts = [self.lineage, self.base.sha256, dataset.task, dataset.sha256, origin, self.config_sha256, self.attempt]
        branch = [{"branch": self.remake.branch}] if self.remake else []
        return hashlib.sha256(json.dumps([*parts, *dataset.new_labels, *branch]).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class AdaptationRun(RunInputs):
    """What the stages from training to report work with. It is made once; no stage reads or downloads it again."""

    run: Run
    """The run's entry in the journal."""
    schema: TaskSchema
    """The schema of the dataset's task."""
    parent_folder: Path | None
    """A copy of the parent's adapter on this machine, compared with its digests; None without a parent."""
    parent_answers: KeptAnswers
    """The parent's answers to the test rows of its tasks; empty without a parent, or if they were forgotten."""
    tasks: tuple[KnownTask, ...]
    """All tasks of the new version, each with the test rows that judge it."""
    renewal: Renewal
    """What the arrival does to the test rows of its task."""

    @property
    def folder(self) -> Path:
        """The folder of the run's checkpoints and results on this machine."""
        return work_folder(self.run.lineage, self.run.short_key)


def find_repeat(dataset: DatasetRef, lineage: str) -> Version | None:
    """Return the accepted version that learned this dataset, or None.

    A version with the same landed rows but another split counts too, unless the champion or one of its ancestors
    learned these rows. In that case the test rows were forgotten, and the arrival brings new test rows.
    """
    versions = Versions(current_store()).all(lineage)
    learned = [version for version in versions if version.standing == "learned"]
    promoted = [version for version in versions if version.since.promoted is not None or version in learned]
    same = [version for version in promoted if version.dataset_sha256 == dataset.sha256]
    if not same and not any(dataset.landed_sha256 in version.digests for version in learned):
        same = [version for version in promoted if dataset.landed_sha256 in version.digests]
    if not same:
        return None
    repeated = next((version for version in learned if version.dataset_sha256 == dataset.sha256), same[0])
    # a rejected one was champion for a while; whether this run repeats it is for the run key to say
    return None if repeated.is_rejected else repeated


def find_own(dataset: DatasetRef, lineage: str) -> Version | None:
    """Return the version that this flow run trained on the dataset before it was interrupted, or None."""
    flow_run = runtime.flow_run.id
    for version in Versions(current_store()).all(lineage):
        if version.flow_run and version.flow_run == flow_run and version.dataset_sha256 == dataset.sha256:
            return version
    return None


def count_attempts(lineage: str, dataset: DatasetRef) -> int:
    """Return the number of the lineage's versions that were trained on this dataset."""
    return sum(version.dataset_sha256 == dataset.sha256 for version in Versions(current_store()).all(lineage))


def identify_base(source: str, quantize: Quantize = "none") -> BaseRef:
    """Load a base model and return its name and digest."""
    base = load(source, quantize)
    return BaseRef(source=source, name=base.name, sha256=base.sha256, quantize=quantize)


def start_run(inputs: RunInputs) -> Run:
    """Write the run into the journal, or continue the one that a crash left."""
    store, dataset, parent, together = current_store(), inputs.dataset, inputs.parent, inputs.consolidation
    write_format(store)  # before anything of a version, so that the store is known as one of this release
    run = Run(
        lineage=inputs.lineage,
        task=dataset.task,
        run_key=inputs.run_key,
        dataset_uri=dataset.uri,
        dataset_sha256=dataset.sha256,
        num_rows={"train": dataset.num_train, "test": dataset.num_test, "rejected": dataset.num_rejected},
        base_sha256=inputs.base.sha256,
        parent_version=parent.version if parent else None,
        params={
            "base": inputs.base.name,
            **settings_of(inputs.spec, inputs.adapter, inputs.strategy),
            "attempt": inputs.attempt,
            **(
                {}
                if together is None
                else {"consolidation": {"start": together.start, "arrivals": len(together.arrivals)}}
            ),
        },
        started=datetime.now(UTC),
    )
    return RunJournal(store).start(run)


def prepare(inputs: RunInputs, run: Run) -> AdaptationRun:
    """Gather what the stages of a run work with, and copy the parent's adapter to this machine.

    The base model is in memory still, and its fingerprint is stored.

    Raises:
        IntegrityError: The parent's adapter is damaged.
        ObjectNotFoundError: The parent's adapter is missing.
    """
    from infra.fingerprints import keep_fingerprint

    store, dataset, parent, record = current_store(), inputs.dataset, inputs.parent, inputs.record
    base = inputs.base
    keep_fingerprint(store, base.sha256, base.quantize, partial(lend_base, base))  # for deal serve --engine
    if record is not None and inputs.consolidation is not None:  # test rows stay as they are
        schema, renewal = choose_task(record, dataset.task).schema, Renewal(None, record.slices, None)
    else:
        schema, renewal = read_manifest(store, dataset.uri).task, find_renewal(store, record, dataset)
    parent_folder = None
    if parent is not None:
        parent_folder = work_folder(run.lineage, run.short_key) / "parent"
        shutil.rmtree(parent_folder, ignore_errors=True)  # of an earlier try, which may be incomplete or damaged
        fetch_adapter(store, parent, parent_folder)
    # The parent's tasks, of which the arrival may replace the test rows, and a task that is new.
    tasks = [
        task.judged_by(dataset) if task == renewal.known else _as_judged_next(store, task)
        for task in (record.tasks if record else ())
    ]
    if renewal.known is None and dataset.num_added:
        added = FrozenRows(dataset_uri=dataset.uri, num_rows=dataset.num_added)
        tasks = [replace(task, added=added) if task.schema.name == dataset.task else task for task in tasks]
    if all(task.schema.name != dataset.task for task in tasks):
        new = KnownTask(
            schema=schema,
            tests=(FrozenRows(dataset_uri=dataset.uri, num_rows=dataset.num_test),),
            max_prompt_tokens=inputs.spec.train.max_prompt_tokens,
            max_new_tokens=inputs.spec.train.answer_tokens(schema.labels),
        )
        tasks.append(new)
    return AdaptationRun(
        **vars(inputs),
        run=run,
        schema=schema,
        parent_folder=parent_folder,
        parent_answers=read_answers(store, parent.adapter_uri) if parent else KeptAnswers({}, {}),
        tasks=tuple(replace(task, schema=dataset.widen(task.schema)) for task in tasks),
        renewal=renewal,
    )


def _as_judged_next(store: ObjectStore, task: KnownTask) -> KnownTask:
    """The task with all of its test rows that were not forgotten; if all of them were, as it is."""
    grown = task.grown()
    return replace(grown, tests=parts_left(store, grown) or grown.tests)


def jobs_of(inputs: RunInputs) -> str:
    """Return the folder in the store for the run's jobs on other machines. It goes when the run is registered."""
    return keys.jobs_folder(keys.adapter_uri(inputs.lineage, keys.short_run(inputs.run_key)))


def remove_work(run: Run) -> None:
    """Delete the run's checkpoints and local results, after everything is in the store."""
    folder = work_folder(run.lineage, run.short_key)
    if folder.exists():
        shutil.rmtree(folder)
